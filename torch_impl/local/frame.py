"""A table with a row of zeros on each side of it in the same memory.

An id that a rank does not own names one of the two, and a lookup is one operation that needs no mask. The table itself
is what lies between: a tensor of its own rows and no others, for whoever it is given to.

Shape suffixes: N rows of the rank's table, E columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["KeptFrame", "empty_table", "framed"]

_ALIGNMENT = 64


def empty_table(num_rows: int, emb_size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A table ``[N, E]`` to be filled; on a CPU, between two rows of zeros.

    It begins at a multiple of 64 bytes, as every tensor does that PyTorch makes. What copies it copies its own rows; the
    memory that it lies in remembers what it was made for, so whatever lies elsewhere is just a table.
    """
    step = _ALIGNMENT // dtype.itemsize
    start = -(-emb_size // step) * step
    on_cpu = torch.device(device).type == "cpu"
    memory = torch.empty(start + (num_rows + 1) * emb_size if on_cpu else 0, dtype=dtype, device=device)
    if not on_cpu or type(memory) is not Tensor:  # one that stands for a tensor has no memory
        return torch.empty(num_rows, emb_size, dtype=dtype, device=device)
    memory[:start].zero_()
    memory[start + num_rows * emb_size :].zero_()
    table = memory[start:].view(num_rows + 1, emb_size)[:num_rows]
    storage: Any = table.untyped_storage()
    storage.frame = (
        (table.data_ptr(), table.shape, dtype),
        ((num_rows + 2, emb_size), (emb_size, 1), start - emb_size),
    )
    return table


def framed(weight: Tensor) -> Tensor | None:
    """The table with its two rows of zeros, ``[N + 2, E]``, without a gradient; None, if it is not one that has them."""
    frame = getattr(weight.untyped_storage(), "frame", None)
    if frame is None or frame[0] != (weight.data_ptr(), weight.shape, weight.dtype) or not weight.is_contiguous():
        return None
    table = weight.detach() if weight.requires_grad and torch.is_grad_enabled() else weight
    return table.as_strided(*frame[1])


class KeptFrame:
    """``framed`` of the same weight call after call: to find out again takes as long as to look a token up.

    It keeps the table's memory, so whoever moves the table elsewhere has to ``drop`` it. Copies of it keep nothing.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Keep nothing."""
        self._kept: tuple[int | None, torch.Size | None, Tensor | None] = (None, None, None)

    def of(self, weight: Tensor) -> Tensor | None:
        """``framed(weight)``, for a weight on a CPU."""
        pointer, shape, table = self._kept
        if weight.data_ptr() != pointer or weight.shape != shape or not weight.is_contiguous():
            table = framed(weight)
            self._kept = weight.data_ptr(), weight.shape, table  # at once, whatever other threads do
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptFrame, ()
