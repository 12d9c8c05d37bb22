"""A rank's rows where ``fully_shard`` has split them again, over other ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["rows_here"]


def rows_here(weight: Any) -> tuple[Tensor, int]:
    """This process's part of a rank's rows, and the number of its first among them.

    Args:
        weight: ``[n, e]``, a plain tensor or a DTensor that is split along dimension 0 or replicated.

    Returns:
        The part, ``[k, e]``, which shares the memory, and its first row in ``[0, n]``.

    Raises:
        ValueError: it is split in another way.
    """
    if not hasattr(weight, "placements"):
        return weight.detach(), 0
    start, stop = 0, len(weight)
    for dim, placement in enumerate(weight.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise ValueError(f"weight must be split along dimension 0 or replicated, got {weight.placements}")
        size = -(-(stop - start) // weight.device_mesh.size(dim))  # as torch.chunk: the last parts are shorter
        start = min(start + size * weight.device_mesh.get_local_rank(dim), stop)
        stop = min(start + size, stop)
    return weight.to_local().detach(), start
