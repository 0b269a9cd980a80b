"""What `train.py` is made of: settings, run folders, checkpoints, the loop, metrics and plots.

Not part of the installed package `caps_kernels`; README.md in this folder describes the files of a
run and defines every number that is reported.
"""
