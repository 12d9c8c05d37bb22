"""Rows of a table by their number, and the gradient: the sum of each row's occurrences.

Shape suffixes: N rows of the rank's table, E columns; the ids' own dimensions are flattened to T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.bits import STORED_DTYPES

__all__ = ["fill_rows", "lookup_rows", "memory_of", "row_gradient", "sum_distinct", "sum_rows", "take_rows"]

_BYTES = 1 << 24


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
        part = torch.empty(min(step, len(rows) - first), rows.shape[1], dtype=rows.dtype)
        fill(first, memory_of(part))
        rows[first : first + len(part)].copy_(part)


def take_rows(weight: Tensor, local: Tensor, owned: Tensor, counted: Tensor | None, sparse: bool) -> Tensor:
    """Row ``local`` of ``weight`` where ``owned``, +0.0 elsewhere.

    Args:
        weight: the table, ``[N, E]``.
        local: row numbers, int64, of any shape; anything at all where not owned.
        owned: True where ``local`` is a row of the table.
        counted: the same, but True only where the row has a gradient; None: where it is owned.
        sparse: make the gradient a sparse COO tensor of the distinct rows.

    Returns:
        ``[*local.shape, E]`` on the device of ``local``.
    """
    lookup = _TracedLookup if torch.compiler.is_compiling() else _Lookup
    return lookup.apply(weight, local, owned, counted, sparse)


class _TracedLookup(torch.autograd.Function):
    """``take_rows`` in the part of autograd that torch.compile traces."""

    @staticmethod
    def forward(weight: Tensor, local: Tensor, owned: Tensor, counted: Tensor | None, sparse: bool) -> Tensor:
        return lookup_rows(weight, local, owned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, local, owned, counted, ctx.sparse = inputs
        ctx.save_for_backward(local, owned if counted is None else counted)
        ctx.num_rows, ctx.device = weight.shape[0], weight.device

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        local, counted = ctx.saved_tensors
        grad = sum_rows(grad_outputs[0], local, counted, ctx.num_rows, ctx.device, ctx.sparse)
        return grad, None, None, None, None


class _Lookup(_TracedLookup):
    """The same for eager mode, with second derivatives, forward mode and vmap; its transpose is ``_RowSum``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _TracedLookup.setup_context(ctx, inputs, output)
        _weight, local, owned, counted, _sparse = inputs
        ctx.save_for_forward(local, owned if counted is None else counted)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        local, counted = ctx.saved_tensors
        grad = _RowSum.apply(grad_outputs[0], local, counted, ctx.num_rows, ctx.device, ctx.sparse)
        return grad, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return lookup_rows(grad_inputs[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        weight, *indices, sparse = inputs
        batched = [_batch_first(t, dim, info.batch_size) for t, dim in zip(indices, in_dims[1:4], strict=True)]
        if in_dims[0] is None:
            return _Lookup.apply(weight, *batched, sparse), 0
        tables = weight.movedim(in_dims[0], 0)
        each = [
            _Lookup.apply(tables[i], *(t if t is None else t[i] for t in batched), sparse) for i in range(len(tables))
        ]
        return torch.stack(each), 0


class _RowSum(torch.autograd.Function):
    """For each row of the table, the sum over the positions that own it; its transpose is ``_Lookup``."""

    @staticmethod
    def forward(
        grad_output: Tensor, local: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
    ) -> Tensor:
        return sum_rows(grad_output, local, counted, num_rows, device, sparse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _grad_output, local, counted, ctx.num_rows, ctx.device, ctx.sparse = inputs
        ctx.save_for_backward(local, counted)
        ctx.save_for_forward(local, counted)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        local, counted = ctx.saved_tensors
        grad = grad_outputs[0].to_dense() if grad_outputs[0].is_sparse else grad_outputs[0]
        return _Lookup.apply(grad, local, counted, None, False), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        local, counted = ctx.saved_tensors
        return sum_rows(grad_inputs[0], local, counted, ctx.num_rows, ctx.device, ctx.sparse)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        *tensors, num_rows, device, sparse = inputs
        batched = [_batch_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims, strict=False)]
        each = zip(*batched, strict=True)
        return torch.stack([_RowSum.apply(*tensors, num_rows, device, sparse) for tensors in each]), 0


def _batch_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _owned_rows_only(weight_device: torch.device, *tensors: Tensor) -> bool:
    """Whether to work on the owned positions alone, whose number only the data tell.

    Worth it on the CPU and between devices. On an accelerator it would make the host wait for the device, and a graph
    that is being traced has no data: there every position is worked on, under a mask.
    """
    if torch.compiler.is_compiling() or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    devices = {weight_device.type, *(t.device.type for t in tensors)}
    return "meta" not in devices and (devices == {"cpu"} or len({weight_device, *(t.device for t in tensors)}) > 1)


def lookup_rows(weight_NE: Tensor, local: Tensor, owned: Tensor) -> Tensor:
    """``take_rows`` without a gradient."""
    # None of these ends in a view: FSDP2 warns of modules that return one.
    if not _owned_rows_only(weight_NE.device, weight_NE, local):
        safe = local.masked_fill(~owned, 0).to(weight_NE.device)
        return F.embedding(safe, weight_NE).to(local.device).masked_fill(~owned.unsqueeze(-1), 0)
    owned_T = owned.reshape(-1)
    if weight_NE.device == local.device and 2 * int(owned_T.count_nonzero()) > owned_T.numel():
        # Mostly owned, as on rank 0 with real text: one gather of everything, then wipe the few foreign rows.
        output = F.embedding(local.masked_fill(~owned, 0), weight_NE)
        output.view(-1, weight_NE.shape[1]).index_fill_(0, (~owned_T).nonzero().squeeze(1), 0)
        return output
    positions = owned_T.nonzero().squeeze(1)
    rows = weight_NE.index_select(0, local.reshape(-1)[positions].to(weight_NE.device)).to(local.device)
    output = rows.new_zeros(*local.shape, weight_NE.shape[1])
    output.view(-1, weight_NE.shape[1]).index_copy_(0, positions, rows)
    return output


def sum_rows(
    grad_output: Tensor, local: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
) -> Tensor:
    """For each of ``num_rows`` rows, the sum of its gradients, on ``device``: the transpose of ``lookup_rows``."""
    emb_size = grad_output.shape[-1]
    grad_TE = grad_output.reshape(-1, emb_size)
    local_T, counted_T = local.reshape(-1), counted.reshape(-1)
    if sparse or _owned_rows_only(device, grad_output, local):
        if torch.compiler.is_compiling():
            raise ValueError("sparse=True cannot be compiled: use sparse=False, or keep the embedding out of the graph")
        distinct, sums = sum_distinct(grad_TE, local_T, counted_T)
        return row_gradient(distinct.to(device), sums.to(device), num_rows, sparse)
    dtype = grad_TE.dtype
    grad_TE = grad_TE.to(torch.float32 if dtype.itemsize < 4 else dtype)
    grad_TE = grad_TE.masked_fill(~counted_T.unsqueeze(1), 0).to(device)
    safe_T = local_T.masked_fill(~counted_T, 0).to(device)
    return torch.ops.aten.embedding_dense_backward(grad_TE, safe_T, num_rows, -1, False).to(dtype)


def row_gradient(distinct: Tensor, sums: Tensor, num_rows: int, sparse: bool) -> Tensor:
    """The gradient ``[num_rows, E]`` whose rows ``distinct``, ascending, are ``sums`` and whose others are zero."""
    size = (num_rows, sums.shape[1])
    if sparse:
        index = distinct.unsqueeze(0)
        return torch.sparse_coo_tensor(index, sums, size, is_coalesced=True, check_invariants=False)
    return _zeros(size, sums).index_copy_(0, distinct, sums)


def _zeros(size: tuple[int, int], like: Tensor) -> Tensor:
    """Zeros of that size, of the dtype and on the device of ``like``.

    On a CPU they come from NumPy, whose zeros are the operating system's, there once they are touched: a gradient then
    costs as much as its rows that are not zero. torch.zeros writes them all (2.8 times slower for 3000 of 32768 rows of
    4 KB; 128 MB of untouched zeros take microseconds instead of 46 ms).
    """
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(size[0] * size[1] * like.element_size(), np.uint8)).view(like.dtype).view(size)


def sum_distinct(grad_TE: Tensor, rows_T: Tensor, counted_T: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    """The distinct rows asked for, ascending, and the sum of each one's gradients in the order of the tokens.

    16-bit gradients are summed in float32, and rounded unless the sums are wanted ``wide``.
    """
    dtype = torch.float32 if wide and grad_TE.dtype.itemsize < 4 else grad_TE.dtype
    positions = counted_T.nonzero().squeeze(1)
    rows, order = rows_T[positions].sort(stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    if distinct.numel() == 0:
        return distinct, grad_TE.new_zeros(0, grad_TE.shape[1], dtype=dtype)
    tokens, offsets = positions[order], counts.cumsum(0) - counts
    if grad_TE.dtype == torch.bfloat16 or dtype != grad_TE.dtype:
        # embedding_bag adds in float32, but rounds ties to bfloat16 upwards, not to even as every cast does.
        summands = grad_TE.index_select(0, tokens).float()
        tokens = torch.arange(len(tokens), device=summands.device)
        return distinct, F.embedding_bag(tokens, summands, offsets, mode="sum").to(dtype)
    return distinct, F.embedding_bag(tokens, grad_TE, offsets, mode="sum")
