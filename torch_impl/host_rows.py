"""Rows of a tensor as NumPy arrays, filled on the host."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shared.bits import STORED_DTYPES

__all__ = ["fill_rows", "memory_of"]

_STEP_BYTES = 1 << 24


def memory_of(rows: Tensor) -> np.ndarray:
    """View a contiguous CPU tensor's memory as a NumPy array."""
    dtype = str(rows.dtype).removeprefix("torch.")
    flat = rows.detach().view(torch.uint8).numpy()
    return flat.view(STORED_DTYPES[dtype])


def fill_rows(rows: Tensor, fill: Callable[[int, np.ndarray], object]) -> None:
    """Fill rows through NumPy arrays.

    A CPU tensor is filled in place, another device by 16 MiB of host memory at a time.

    Args:
        rows: contiguous, on a device with storage.
        fill: called with the number of the first row, and an array ``[k, e]`` for that row and the next ones.
    """
    if rows.device.type == "cpu":
        fill(0, memory_of(rows))
        return
    step = max(1, _STEP_BYTES // (rows.shape[1] * rows.element_size()))
    for first in range(0, len(rows), step):
        part = torch.empty(min(step, len(rows) - first), rows.shape[1], dtype=rows.dtype, device="cpu")
        fill(first, memory_of(part))
        rows[first : first + len(part)].copy_(part)
