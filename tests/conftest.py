"""Settings of all tests."""

from __future__ import annotations

import torch

from caps_kernels import backends

# Tests run tiny problems, which several threads only make slower, much so on a busy machine. What is said of numbers of
# threads is tested with numbers of threads set there.
torch.set_num_threads(1)

if backends.TRITON_INTERPRETS:
    from caps_kernels.inspect.interpreter import quicken

    quicken()
