"""A table that has a row of zeros on each side of it in memory.

An id that a rank does not own names one of the two, and a lookup is one operation that needs no mask. The table itself
is a tensor of its own rows and no others, in a storage that ends where they end: what saves, moves, shares or ties it
finds nothing else. Its storage, as long as it lives, knows the longer table around it.

Shape suffixes: N rows of the rank's table, E columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["empty_table", "framed"]

_ALIGNMENT = 64


def empty_table(num_rows: int, emb_size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A table ``[N, E]`` to be filled; on a CPU, between two rows of zeros.

    It begins at a multiple of 64 bytes, as every tensor does that PyTorch makes. Its storage cannot be resized: what lies
    around it would not move along.
    """
    step = _ALIGNMENT // dtype.itemsize
    start = -(-emb_size // step) * step
    on_cpu = torch.device(device).type == "cpu"
    memory = torch.empty(start + (num_rows + 1) * emb_size if on_cpu else 0, dtype=dtype, device=device)
    if not on_cpu or type(memory) is not Tensor:  # one that stands for a tensor has no memory
        return torch.empty(num_rows, emb_size, dtype=dtype, device=device)
    longer = memory[start - emb_size :].view(num_rows + 2, emb_size)
    longer[0].zero_()
    longer[-1].zero_()
    table = from_dlpack(longer[1:-1])
    storage: Any = table.untyped_storage()
    storage.frame = table.data_ptr(), table.shape, dtype, longer
    return table


def framed(weight: Tensor) -> Tensor | None:
    """The table with its two rows of zeros, ``[N + 2, E]``, without a gradient; None, if it is not one that has them."""
    frame = getattr(weight.untyped_storage(), "frame", None)
    if frame is None:
        return None
    pointer, shape, dtype, longer = frame
    same = weight.data_ptr() == pointer and weight.dtype is dtype and weight.shape == shape and weight.is_contiguous()
    return longer if same else None
