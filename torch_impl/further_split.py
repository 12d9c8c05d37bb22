"""This process's part of a table that DTensor splits.

The layer's mesh, ``fully_shard``, or both may have split it.
"""

from torch import Tensor

from torch_impl.ids import is_dtensor
from torch_impl.private_api import is_split_last

__all__ = ["rows_here"]


def rows_here(weight: Tensor) -> tuple[Tensor, int]:
    """Find this process's part of a tensor, and its first row.

    Args:
        weight: ``[n, ...]``, plain, or a DTensor split along dimension 0 or replicated.

    Returns:
        The part, ``[k, ...]``, which shares memory, and its first row in ``[0, n]``.

    Raises:
        ValueError: the tensor is split in another way.
    """
    if not is_dtensor(weight):
        return weight.detach(), 0
    split = [(dim, placement) for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    start, stop = 0, len(weight)
    for dim, placement in sorted(split, key=lambda each: is_split_last(each[1])):
        if getattr(placement, "dim", None) != 0 or placement.is_partial():
            raise ValueError(f"weight must be split along dimension 0 or replicated, got {weight.placements}")
        size = -(-(stop - start) // weight.device_mesh.size(dim))  # as torch.chunk: the last parts may be shorter
        start = min(start + size * weight.device_mesh.get_local_rank(dim), stop)
        stop = min(start + size, stop)
    return weight.detach().to_local(), start  # type: ignore[attr-defined]
