"""The layer in the terms of other libraries; each module imports its library when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_impl.adapters.dtensor import VocabParallel

__all__ = ["VocabParallel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from torch_impl.adapters import dtensor

        return getattr(dtensor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
