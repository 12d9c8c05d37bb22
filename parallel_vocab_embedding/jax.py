"""The JAX backend, ``jax_impl``: the same objects."""

from jax_impl import *
from jax_impl import __all__ as __all__
