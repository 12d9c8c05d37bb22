"""The PyTorch backend, ``torch_impl``: the same objects."""

from torch_impl import *
from torch_impl import __all__ as __all__
