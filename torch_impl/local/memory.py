"""Where tensors lie on a CPU: memory shared with NumPy, zeros that cost nothing until they are touched, huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.bits import STORED_DTYPES

__all__ = [
    "MANY_BYTES",
    "PLAIN",
    "empty_to_fill",
    "fill_rows",
    "memory_of",
    "on_cpu",
    "owned_rows_only",
    "traced",
    "zeros",
]

MANY_BYTES = 1 << 25
"""From there on the C library takes fresh memory from the operating system for each tensor, and gives it back."""
_BYTES = 1 << 24
PLAIN = (Tensor, torch.nn.Parameter)


def memory_of(rows: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on a CPU as a NumPy array: writing to one is writing to the other."""
    dtype = str(rows.dtype).removeprefix("torch.")
    flat = rows.detach().view(torch.uint8).numpy()
    return flat.view(STORED_DTYPES[dtype])


def fill_rows(rows: Tensor, fill: Callable[[int, np.ndarray], Any]) -> None:
    """Have NumPy arrays filled that become the rows: on a CPU their own memory, else 16 MiB at a time.

    Args:
        rows: a contiguous tensor, on any device that has storage.
        fill: called with the number of the first row, and the array ``[k, e]`` of that and the next ones.
    """
    if rows.device.type == "cpu":
        fill(0, memory_of(rows))
        return
    step = max(1, _BYTES // (rows.shape[1] * rows.element_size()))
    for first in range(0, len(rows), step):
        part = torch.empty(min(step, len(rows) - first), rows.shape[1], dtype=rows.dtype, device="cpu")
        fill(first, memory_of(part))
        rows[first : first + len(part)].copy_(part)


def zeros(size: tuple[int, ...], like: Tensor, most_are_written: bool = False) -> Tensor:
    """Zeros of that size, of the dtype and on the device of ``like``.

    Many of them, on a CPU, are the operating system's, there once they are touched: a gradient then costs as much as its
    rows that are not zero. torch.zeros writes them all (46 ms for 128 MB of which nothing is touched).
    """
    if like.device.type != "cpu" or math.prod(size) * like.element_size() < MANY_BYTES:
        return like.new_zeros(size)
    return _mapped(size, like.dtype, most_are_written)


def empty_to_fill(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU of which every element is about to be written.

    What the C library has kept is the fastest memory there is. Where many bytes would be fresh ones, they are taken in
    huge pages: to fault so many small ones in takes longer than to write them.
    """
    tensor = torch.empty(size, dtype=dtype, device="cpu")
    if tensor.nbytes < MANY_BYTES or _is_there(tensor):
        return tensor
    del tensor
    return _mapped(size, dtype, huge_pages=True)


_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None)


def _is_there(tensor: Tensor) -> bool:
    """Whether the page in the middle of a tensor's memory is one that has been written to before."""
    page, there = (tensor.data_ptr() + tensor.nbytes // 2) // _PAGE * _PAGE, ctypes.c_ubyte(1)
    _LIBC.mincore(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), ctypes.byref(there))
    return bool(there.value & 1)


def _mapped(size: tuple[int, ...], dtype: torch.dtype, huge_pages: bool) -> Tensor:
    """Zeros in memory of their own.

    In huge pages, where nearly all of it will be written; in small ones, where little will be: a huge page is cleared as
    a whole.
    """
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor: Any = torch.empty(0, dtype=dtype, device="cpu")
    return tensor.set_(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage(), 0, size)


def traced() -> bool:
    """Whether what is done is being written down, to be done again with other data: then nothing may depend on these."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def on_cpu(one: Tensor, other: Tensor) -> bool:
    """Whether what is done may depend on the data without anything having to wait for it.

    A graph that is being traced has no data, nor has a tensor that stands for another.
    """
    both = one.is_cpu and other.is_cpu and type(one) in PLAIN and type(other) in PLAIN
    return both and not traced()


def owned_rows_only(device: torch.device, one: Tensor, other: Tensor) -> bool:
    """Whether to work on the owned positions alone, whose number only the data tell.

    Worth it on the CPU and between devices. On an accelerator it would make the host wait for the device: there every
    position is worked on, under a mask.
    """
    if traced() or not (type(one) in PLAIN and type(other) in PLAIN):
        return False
    devices = {device, one.device, other.device}
    return (len(devices) > 1 or one.is_cpu) and torch.device("meta") not in devices
