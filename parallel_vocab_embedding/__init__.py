"""Both backends under one name: ``.torch`` is ``torch_impl``, ``.jax`` is ``jax_impl``.

Each is imported on use, so that neither framework needs the other.

Example:
    >>> import parallel_vocab_embedding as pve
    >>> pve.torch.ParallelVocabEmbedding(12, 4, rank=1, world_size=3).partition.owned_range(1)
    (4, 8)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_vocab_embedding import jax, torch

__all__ = ["jax", "torch"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
