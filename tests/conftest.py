"""Settings of all tests."""

from __future__ import annotations

import torch

# Tests run tiny problems, which several threads only make slower, much so on a busy machine. What is said of numbers of
# threads is tested with numbers of threads set there.
torch.set_num_threads(1)
