"""caps_kernels: capsule networks fast enough to use."""

from caps_kernels import backends as backends
from caps_kernels import functional as functional
from caps_kernels import nn as nn
from caps_kernels._version import __version__ as __version__
from caps_kernels.backends import BackendError as BackendError
from caps_kernels.backends import FallbackWarning as FallbackWarning
from caps_kernels.convert import convert_weight as convert_weight
from caps_kernels.nn import CapsuleLayer as CapsuleLayer
from caps_kernels.nn import Decoder as Decoder
from caps_kernels.nn import MarginLoss as MarginLoss
from caps_kernels.nn import PrimaryCapsules as PrimaryCapsules
