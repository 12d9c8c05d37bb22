"""The gradient of a table: for each row the sum over the tokens that asked for it.

Shape suffixes: N rows of the rank's table, E columns; the ids' own dimensions are flattened to T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_impl import gpu
from torch_impl.local.memory import MANY_BYTES, owned_rows_only, zeros

__all__ = ["is_small", "row_gradient", "sum_distinct", "sum_in_place", "sum_rows"]

_PART_BYTES = 1 << 21
"""Of half a megabyte to 32, what was fastest on a machine with 1 MiB of second-level and 32 of third-level cache."""


def sum_rows(
    grad_output: Tensor, rows: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
) -> Tensor:
    """For each of ``num_rows`` rows, the sum of its gradients, on ``device``: the transpose of ``lookup_rows``."""
    emb_size = grad_output.shape[-1]
    grad_TE = grad_output.reshape(-1, emb_size)
    rows_T, counted_T = rows.reshape(-1), counted.reshape(-1)
    if sparse or owned_rows_only(device, grad_output, rows):
        if torch.compiler.is_compiling():
            raise ValueError("sparse=True cannot be compiled: use sparse=False, or keep the embedding out of the graph")
        if not sparse and device.type == "cpu" and is_small(grad_output, rows, num_rows):
            return sum_in_place(grad_output, torch.where(counted, rows, -1), num_rows).to(grad_output.dtype)
        distinct, sums = sum_distinct(grad_TE, rows_T, counted_T)
        return row_gradient(distinct.to(device), sums.to(device), num_rows, sparse)
    if device == rows.device and gpu.serves(grad_TE, rows_T):
        return gpu.sum_rows_by_key(grad_TE, torch.where(counted_T, rows_T, num_rows), num_rows)
    dtype = grad_TE.dtype
    grad_TE = grad_TE.to(torch.float32 if dtype.itemsize < 4 else dtype)
    grad_TE = grad_TE.masked_fill(~counted_T.unsqueeze(1), 0).to(device)
    return torch.ops.aten.embedding_dense_backward(grad_TE, rows_T.to(device), num_rows, -1, False).to(dtype)


def is_small(grad_output: Tensor, rows: Tensor, num_rows: int) -> bool:
    """Whether to add gradients up where they belong is faster than to sort them, on a CPU: the bits are the same."""
    most = 1 << 16 if grad_output.dtype.itemsize < 4 else MANY_BYTES // grad_output.dtype.itemsize
    few = num_rows * grad_output.shape[-1] < most and rows.numel() <= _SMALL_TOKENS
    return few and grad_output.is_cpu and rows.is_cpu


def sum_in_place(grad_output: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The sum of each row's gradients, float32 of 16-bit ones, added up where they belong; row -1 has none."""
    wide = grad_output.float() if grad_output.dtype.itemsize < 4 else grad_output
    return torch.ops.aten.embedding_dense_backward(wide, rows, num_rows, -1, False)


_SMALL_TOKENS = 1 << 14


def row_gradient(distinct: Tensor, sums: Tensor, num_rows: int, sparse: bool) -> Tensor:
    """The gradient ``[num_rows, E]`` whose rows ``distinct``, ascending, are ``sums`` and whose others are zero."""
    size = (num_rows, sums.shape[1])
    if sparse:
        index = distinct.unsqueeze(0)
        return torch.sparse_coo_tensor(index, sums, size, is_coalesced=True, check_invariants=False)
    return zeros(size, sums, 4 * len(distinct) > num_rows).index_copy_(0, distinct, sums)


def sum_distinct(grad_TE: Tensor, rows_T: Tensor, counted_T: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    """The distinct rows asked for, ascending, and the sum of each one's gradients in the order of the tokens.

    16-bit gradients are summed in float32, and rounded unless the sums are wanted ``wide``.
    """
    dtype = torch.float32 if wide and grad_TE.dtype.itemsize < 4 else grad_TE.dtype
    if len(rows_T) <= _FEW_TOKENS and grad_TE.is_cpu and rows_T.is_cpu:
        return _sum_few(grad_TE, rows_T, counted_T, dtype)
    positions = counted_T.nonzero().squeeze(1)
    rows, order = rows_T[positions].sort(stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    if distinct.numel() == 0:
        return distinct, grad_TE.new_zeros(0, grad_TE.shape[1], dtype=dtype)
    tokens, offsets = positions[order], counts.cumsum(0) - counts
    if grad_TE.dtype != torch.bfloat16 and dtype == grad_TE.dtype:
        return distinct, F.embedding_bag(tokens, grad_TE, offsets, mode="sum")
    # embedding_bag adds in float32, but rounds ties to bfloat16 upwards, not to even as every cast does.
    sums = grad_TE.new_empty(len(distinct), grad_TE.shape[1], dtype=dtype)
    parts = list(_parts(offsets, len(tokens), grad_TE.shape[1] * 4))
    most = max(stop - start for _, _, start, stop in parts)
    every = torch.arange(most, device=tokens.device)
    narrow = grad_TE.new_empty(most, grad_TE.shape[1])
    wide_TE = torch.empty_like(narrow, dtype=torch.float32)
    for first, last, start, stop in parts:
        count = stop - start
        summands = wide_TE[:count].copy_(torch.index_select(grad_TE, 0, tokens[start:stop], out=narrow[:count]))
        sums[first:last] = torch.embedding_bag(summands, every[:count], offsets[first:last] - start)[0]
    return distinct, sums


def _sum_few(grad_TE: Tensor, rows_T: Tensor, counted_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, bit for bit, of so few tokens that lists take less time than operations."""
    rows = [row if counted else -1 for row, counted in zip(rows_T.tolist(), counted_T.tolist(), strict=True)]
    distinct = sorted({*rows} - {-1})
    place = {row: i for i, row in enumerate(distinct)}
    places = torch.tensor([place.get(row, -1) for row in rows], dtype=torch.int64, device="cpu")
    wide_TE = grad_TE.float() if grad_TE.dtype.itemsize < 4 else grad_TE
    sums = torch.ops.aten.embedding_dense_backward(wide_TE, places, len(distinct), -1, False)
    return torch.tensor(distinct, dtype=torch.int64, device="cpu"), sums.to(dtype)


_FEW_TOKENS = 64


def _parts(offsets: Tensor, count: int, row_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs ``[first, last)`` and their items ``[start, stop)``, two megabytes of float32 or so at a time, for the cache.

    All at once on an accelerator, which has no such cache and whose numbers the host would have to wait for.
    """
    if offsets.device.type != "cpu" or count * row_bytes <= _PART_BYTES:
        yield 0, len(offsets), 0, count
        return
    starts = offsets.numpy()
    cuts = np.unique(np.searchsorted(starts, np.arange(0, count, max(1, _PART_BYTES // row_bytes))))
    bounds = [*starts.tolist(), count]
    for first, last in itertools.pairwise([*cuts.tolist(), len(starts)]):
        yield first, last, bounds[first], bounds[last]
