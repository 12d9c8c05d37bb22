"""Rows of a tensor as NumPy arrays, to be filled on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.bits import STORED_DTYPES

__all__ = ["fill_rows", "memory_of"]

_STEP_BYTES = 1 << 24


def memory_of(rows: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as a NumPy array: writing to one is writing to the other."""
    dtype = str(rows.dtype).removeprefix("torch.")
    flat = rows.detach().view(torch.uint8).numpy()
    return flat.view(STORED_DTYPES[dtype])


def fill_rows(rows: Tensor, fill: Callable[[int, np.ndarray], Any]) -> None:
    """Fill the rows through NumPy arrays: in place on a CPU, else by way of 16 MiB of host memory at a time.

    Args:
        rows: a contiguous tensor, on any device that has storage.
        fill: called with the number of the first row, and an array ``[k, e]`` for it and the next ones.
    """
    if rows.device.type == "cpu":
        fill(0, memory_of(rows))
        return
    step = max(1, _STEP_BYTES // (rows.shape[1] * rows.element_size()))
    for first in range(0, len(rows), step):
        part = torch.empty(min(step, len(rows) - first), rows.shape[1], dtype=rows.dtype, device="cpu")
        fill(first, memory_of(part))
        rows[first : first + len(part)].copy_(part)
