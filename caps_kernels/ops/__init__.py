"""The ops, one folder each; a folder's `__init__` holds the op, and each other module one backend's way to run it."""
