"""Operators in stock PyTorch operations, for CPUs.

They are correct on every device; on an accelerator the host waits for the number of rows.
Shape suffixes: N rows of the table, E columns, T tokens, K distinct rows.
"""

import math
import mmap

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["LARGE_BYTES", "accumulation_dtype", "empty", "gather", "scatter_add", "spread", "sum_rows"]

LARGE_BYTES = 2**25
"""Bytes from which eager lookups use NumPy's memory and gradients use mapped zeros.

From here the C library maps fresh pages for every tensor. With NumPy's memory a lookup of 32 MiB in float32 on 2 cores
took 2.1 ms instead of 12.9; one of 8 MiB in one process took 0.32 instead of 0.14. Writing 180 rows of 512 bytes into
16 MiB of zeros took 0.13 ms with cleared memory, 0.26 with mapped memory.
"""

_HUGE_PAGE_BYTES = 2**22
"""Bytes from which NumPy asks for huge pages, which cost fewer page faults.

Allocating the 8 MiB of rows of an exchange in each of four gloo processes took 1.3 ms instead of 11.
"""

_SMALL_TABLE = 2**16
"""Elements of a table up to which gradients are summed without finding the occurring rows.

64 tokens on a table of 64 x 16 in bfloat16 took 20 us instead of 91.
"""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: float32 for 16-bit dtypes, else the given one."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialised memory; large CPU tensors get NumPy's huge pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return _as_tensor(torch.from_numpy(np.empty(num_bytes, np.uint8)), shape, dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros; large CPU tensors are mapped and cleared on first use.

    Pages are small: writing a single row would clear a whole huge page. Forward and backward of an all_reduce over Zipf
    ids in float32, in four gloo processes, took 60 to 90 ms; with NumPy's huge pages 80 to 400.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < LARGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)
    return _as_tensor(torch.frombuffer(memory, dtype=torch.uint8), shape, dtype)


def _as_tensor(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Wrap bytes as a tensor that is not a view.

    FSDP2 warns of modules that return a view.
    """
    return from_dlpack(memory.view(dtype).view(shape))


def gather(table_NE: Tensor, rows: Tensor) -> Tensor:
    """Copy the table's row for each row number: ``[*rows.shape, E]``."""
    output = empty((*rows.shape, table_NE.shape[1]), table_NE.dtype, table_NE.device)
    torch.index_select(table_NE.detach(), 0, rows.reshape(-1), out=output.view(-1, table_NE.shape[1]))
    return output


def sum_rows(grad_TE: Tensor, keys_T: Tensor, num_rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Sum the gradients of each occurring row.

    On CPUs the order of sums is that of the tokens; on GPUs it is not fixed.

    Args:
        grad_TE: gradients of the tokens, ``[T, E]``.
        keys_T: each token's row, int64; ``num_rows`` for none.
        num_rows: rows of the table.
        dtype: dtype of the sums, rounded once; default: that of ``grad_TE``.

    Returns:
        The occurring rows, ascending, ``[K]``, and their sums, ``[K, E]``.
    """
    positions = (keys_T < num_rows).nonzero().squeeze(1)
    distinct_K, slots = keys_T[positions].unique(return_inverse=True)
    terms = _to(gather(grad_TE, positions), accumulation_dtype(grad_TE.dtype))
    sums_KE = empty((len(distinct_K), terms.shape[1]), terms.dtype, terms.device).zero_()
    sums_KE.scatter_add_(0, slots.unsqueeze(1).expand_as(terms), terms)
    return distinct_K, _to(sums_KE, dtype or grad_TE.dtype)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else empty(tuple(tensor.shape), dtype, tensor.device).copy_(tensor)


def scatter_add(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    """Sum the tokens' gradients by row: ``[num_rows, E]``, zero for other rows.

    Arguments are those of ``sum_rows``. The result has the dtype of ``grad_TE``.
    """
    if num_rows * grad_TE.shape[1] <= _SMALL_TABLE and grad_TE.device.type == "cpu":
        wide = grad_TE.to(accumulation_dtype(grad_TE.dtype))
        # It also adds in the order of the tokens, and skips key ``num_rows``.
        sums = torch.ops.aten.embedding_dense_backward(wide, keys_T, num_rows, num_rows, False)
        return sums.to(grad_TE.dtype)
    return spread(*sum_rows(grad_TE, keys_T, num_rows), num_rows)


def spread(distinct_K: Tensor, sums_KE: Tensor, num_rows: int) -> Tensor:
    """Copy distinct rows' sums into a table of zeros, ``[num_rows, E]``."""
    total = _zeros((num_rows, sums_KE.shape[1]), sums_KE.dtype, sums_KE.device)
    return total.index_copy_(0, distinct_K, sums_KE)
