"""Adapters to other libraries, which are imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_impl.adapters.dtensor import VocabParallel

__all__ = ["VocabParallel"]


def __getattr__(name: str) -> type[VocabParallel]:
    if name in __all__:
        from torch_impl.adapters import dtensor

        return getattr(dtensor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
