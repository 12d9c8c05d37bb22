"""Rows of a table by their number, and the gradient: the sum of each row's occurrences.

Shape suffixes: N rows of the rank's table, E columns; the ids' own dimensions are flattened to T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from shared.partition import VocabPartition
from torch_impl import gpu
from torch_impl.local.frame import framed
from torch_impl.local.memory import MANY_BYTES, empty_to_fill, on_cpu, owned_rows_only, traced, zeros
from torch_impl.local.sums import is_small, sum_in_place, sum_rows

__all__ = [
    "differentiable",
    "gather_rows",
    "lookup_own",
    "lookup_rows",
    "row_sum",
    "take_own",
    "take_rows",
    "transformed",
]


def take_own(
    weight: Tensor, ids: Tensor, partition: VocabPartition, rank: int | Tensor, padding_idx: int | None, sparse: bool
) -> Tensor:
    """The rank's rows of the ids, +0.0 for every id that it does not own.

    Args:
        weight: the rank's rows, ``[N, E]``.
        ids: int64, of any shape.
        partition: who owns what.
        rank: whose rows these are; under a compiler a 0-d tensor.
        padding_idx: a global id whose row gets no gradient.
        sparse: make the gradient a sparse COO tensor of the distinct rows.

    Returns:
        ``[*ids.shape, E]`` on the device of the ids.
    """
    if transformed():
        return _take_masked(weight, ids, partition, rank, padding_idx, sparse)
    if not sparse and gpu.serves(weight, ids):
        from torch_impl.gpu.lookup import fused_lookup

        return fused_lookup(weight, ids, *partition.owned_range(int(rank)), padding_idx)
    recorded = differentiable(weight)
    if recorded and padding_idx is None and not sparse and on_cpu(weight, ids) and _exact(weight, ids):
        rows, owned = partition.clipped_rows(ids.contiguous(), rank)
        return torch.where(owned.unsqueeze(-1), torch.embedding(weight, rows), 0)
    table = _table_with_zeros(weight, ids, partition, rank)
    if table is None:
        return _take_masked(weight, ids, partition, rank, padding_idx, sparse)
    rows = partition.framed_rows(ids, rank)
    if not recorded:
        return gather_rows(table, rows)
    padding_row = None if padding_idx is None else partition.local_ids(padding_idx, rank)
    return _framed_lookup(weight, (table, rows, padding_row), sparse)


def _take_masked(
    weight: Tensor, ids: Tensor, partition: VocabPartition, rank: Any, padding_idx: int | None, sparse: bool
) -> Tensor:
    rows, owned = partition.clipped_rows(ids, rank)
    counted = None if padding_idx is None else owned & (ids != padding_idx)
    return take_rows(weight, rows, owned, counted, sparse)


def take_few(weight: Tensor, ids: Any, partition: VocabPartition, rank: int) -> Tensor | None:
    """``take_own`` without a gradient, for ids that take less time to look up than it takes to decide how; else None."""
    if type(ids) is not Tensor or ids.dtype is not torch.int64 or not on_cpu(weight, ids):
        return None
    if ids.numel() > _FEW_TOKENS or partition.has_padding(rank) or torch._C._are_functorch_transforms_active():
        return None
    table = framed(weight)
    return None if table is None else torch.embedding(table, partition.framed_rows(ids, rank))


def lookup_own(weight: Tensor, ids: Tensor, partition: VocabPartition, rank: int) -> Tensor:
    """``take_own`` without a gradient."""
    table = _table_with_zeros(weight, ids, partition, rank)
    if table is not None:
        return gather_rows(table, partition.framed_rows(ids, rank))
    return lookup_rows(weight, *partition.clipped_rows(ids, rank))


def _table_with_zeros(weight: Tensor, ids: Tensor, partition: VocabPartition, rank: Any) -> Tensor | None:
    """The table with a row of zeros at each end, where it has them and its last row is not one of padding."""
    if not on_cpu(weight, ids) or partition.has_padding(rank):
        return None
    return framed(weight)


def take_rows(weight: Tensor, rows: Tensor, owned: Tensor, counted: Tensor | None, sparse: bool) -> Tensor:
    """Row ``rows`` of ``weight`` where ``owned``, +0.0 elsewhere.

    Args:
        weight: the table, ``[N, E]``.
        rows: row numbers of the table, int64, of any shape.
        owned: where they are to be looked up.
        counted: where they have a gradient, nowhere but where owned; None: wherever owned.
        sparse: make the gradient a sparse COO tensor of the distinct rows.

    Returns:
        ``[*rows.shape, E]`` on the device of ``rows``.
    """
    if torch.compiler.is_compiling():
        return _TracedLookup.apply(weight, rows, owned, counted, sparse)
    if torch._C._are_functorch_transforms_active():
        return _TransformedLookup.apply(weight, rows, owned, counted, sparse)
    if not differentiable(weight):
        return lookup_rows(weight, rows, owned)
    return _lookup(weight, (rows, owned, counted), sparse)


def _exact(weight: Tensor, ids: Tensor) -> bool:
    """Whether to leave a batch's gradient to PyTorch: one so small that a Python function in the graph takes longer.

    PyTorch adds 16-bit gradients up in their own dtype: exact, if no id is there twice.
    """
    itemsize, (num_rows, emb_size), tokens = weight.dtype.itemsize, weight.shape, ids.numel()
    if tokens * emb_size * itemsize > _FEW_BYTES or num_rows * emb_size * itemsize >= MANY_BYTES:
        return False
    if itemsize >= 4 or tokens <= 1:
        return True
    return tokens <= _FEW_TOKENS and len(set(ids.reshape(-1).tolist())) == tokens


_FEW_BYTES = 1 << 17
_FEW_TOKENS = 64


def differentiable(tensor: Tensor) -> bool:
    """Whether reverse or forward mode has to know what is done with the tensor. To ask takes no time; its nodes do."""
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether a compiler, a transform of torch.func or forward mode is at work, which only ``take_rows`` has rules for."""
    return traced() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _keep(ctx: Any, weight: Tensor, rows: Tensor, counted: Tensor, sparse: bool) -> None:
    ctx.save_for_backward(rows, counted)
    ctx.num_rows, ctx.device, ctx.sparse = weight.shape[0], weight.device, sparse


def _gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient of the table, itself differentiable where that is wanted."""
    rows, counted = ctx.saved_tensors
    return row_sum(grad_output, rows, counted, ctx.num_rows, ctx.device, ctx.sparse)


class _Lookup(torch.autograd.Function):
    """``take_rows`` in eager mode, with second derivatives and forward mode; its transpose is ``_RowSum``.

    Only the table is an argument of its own: each costs time, a tensor most.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: tuple[Tensor, Tensor, Tensor | None], sparse: bool) -> Tensor:
        rows, owned, counted = indices
        _keep(ctx, weight, rows, owned if counted is None else counted, sparse)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*ctx.to_save)
        return lookup_rows(weight, rows, owned)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _gradient(ctx, grad_outputs[0]), None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return lookup_rows(grad_inputs[0], *ctx.saved_tensors)


class _FramedLookup(torch.autograd.Function):
    """The same where the table lies between two rows of zeros, which the first and the last row number name."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: tuple[Tensor, Tensor, int | None], sparse: bool) -> Tensor:
        table, rows, ctx.padding_row = indices
        ctx.save_for_backward(rows)
        ctx.num_rows, ctx.sparse = len(weight), sparse
        return gather_rows(table, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (framed_rows,), num_rows, grad_output = ctx.saved_tensors, ctx.num_rows, grad_outputs[0]
        plain = ctx.padding_row is None and not (ctx.sparse or differentiable(grad_output))
        if plain and grad_output.dtype.itemsize < 4 and is_small(grad_output, framed_rows, num_rows):
            sums = sum_in_place(grad_output, framed_rows, num_rows + 2)
            return sums[1:-1].to(grad_output.dtype), None, None
        rows = framed_rows - 1
        inside = rows.clamp(0, num_rows - 1)
        counted = inside == rows
        if ctx.padding_row is not None:
            counted &= rows != ctx.padding_row
        return row_sum(grad_output, inside, counted, num_rows, rows.device, ctx.sparse), None, None


# What Function.apply comes to where no transform is active; to find that out again takes it 2 us.
_lookup = super(torch.autograd.Function, _Lookup).apply
_framed_lookup = super(torch.autograd.Function, _FramedLookup).apply


class _TracedLookup(torch.autograd.Function):
    """The same in the part of autograd that torch.compile traces."""

    @staticmethod
    def forward(weight: Tensor, rows: Tensor, owned: Tensor, counted: Tensor | None, sparse: bool) -> Tensor:
        return lookup_rows(weight, rows, owned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, rows, owned, counted, sparse = inputs
        _keep(ctx, weight, rows, owned if counted is None else counted, sparse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, counted = ctx.saved_tensors
        grad = sum_rows(grad_outputs[0], rows, counted, ctx.num_rows, ctx.device, ctx.sparse)
        return grad, None, None, None, None


class _TransformedLookup(_TracedLookup):
    """The same for the transforms of torch.func, vmap among them, which want the context apart: that takes 20 us a call."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _TracedLookup.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _gradient(ctx, grad_outputs[0]), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return lookup_rows(grad_inputs[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        batched: list[Any] = [
            _batch_first(t, dim, info.batch_size) for t, dim in zip(inputs[1:4], in_dims[1:4], strict=True)
        ]
        if in_dims[0] is None:
            return take_rows(inputs[0], batched[0], batched[1], batched[2], inputs[4]), 0
        each = []
        for i, table in enumerate(inputs[0].movedim(in_dims[0], 0)):
            here: list[Any] = [t if t is None else t[i] for t in batched]
            each.append(take_rows(table, here[0], here[1], here[2], inputs[4]))
        return torch.stack(each), 0


def row_sum(
    grad_output: Tensor, rows: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
) -> Tensor:
    """``sum_rows``, itself differentiable where that is wanted."""
    add_up = _RowSum.apply if differentiable(grad_output) else sum_rows
    return add_up(grad_output, rows, counted, num_rows, device, sparse)


class _RowSum(torch.autograd.Function):
    """For each row of the table, the sum over the positions that own it; its transpose is ``_Lookup``."""

    @staticmethod
    def forward(
        grad_output: Tensor, rows: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
    ) -> Tensor:
        return sum_rows(grad_output, rows, counted, num_rows, device, sparse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _grad_output, rows, counted, ctx.num_rows, ctx.device, ctx.sparse = inputs
        ctx.save_for_backward(rows, counted)
        ctx.save_for_forward(rows, counted)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        rows, counted = ctx.saved_tensors
        grad = grad_outputs[0].to_dense() if grad_outputs[0].is_sparse else grad_outputs[0]
        return take_rows(grad, rows, counted, None, False), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        rows, counted = ctx.saved_tensors
        return sum_rows(grad_inputs[0], rows, counted, ctx.num_rows, ctx.device, ctx.sparse)

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


def lookup_rows(weight_NE: Tensor, rows: Tensor, owned: Tensor) -> Tensor:
    """``take_rows`` without a gradient."""
    if not on_cpu(weight_NE, rows):
        if owned_rows_only(weight_NE.device, weight_NE, rows):
            return _travelling_rows(weight_NE, rows, owned)
        if gpu.serves(weight_NE, rows) and not traced():  # a compiler makes one kernel of the rest
            from torch_impl.gpu.kernels import take_owned_rows

            return take_owned_rows(weight_NE, torch.where(owned, rows, -1), 0, len(weight_NE), None, False)[0]
        return F.embedding(rows, weight_NE).masked_fill(~owned.unsqueeze(-1), 0)
    here, tokens, emb_size = int(owned.count_nonzero()), rows.numel(), weight_NE.shape[1]
    row_bytes = emb_size * weight_NE.element_size()
    if here == 0:
        return zeros((*rows.shape, emb_size), weight_NE)
    output = gather_rows(weight_NE, rows)
    if here == tokens:
        return output
    if (tokens - here) * _FILL_BYTES < tokens * row_bytes:
        output.view(-1, emb_size).index_fill_(0, (~owned).reshape(-1).nonzero().squeeze(1), 0)
    else:
        # Bits times one or zero, as integers: exact, NaN or not, and by far the fastest way to wipe many rows.
        output.view(_WORDS[math.gcd(row_bytes, 4)]).mul_(owned.unsqueeze(-1))
    return output


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """A row of a table on the CPU for each number: ``[*rows.shape, E]``, without a gradient."""
    emb_size = table.shape[1]
    if rows.numel() * emb_size * table.element_size() < MANY_BYTES:
        return torch.embedding(table, rows)
    output = empty_to_fill((*rows.shape, emb_size), table.dtype)
    torch.index_select(table.detach(), 0, rows.reshape(-1), out=output.view(-1, emb_size))
    return output  # and not a view of it: FSDP2 warns of modules that return one


_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
_FILL_BYTES = 8192
"""To fill a row with zeros by its number takes as long as to multiply so many bytes."""


def _travelling_rows(weight_NE: Tensor, rows: Tensor, owned: Tensor) -> Tensor:
    """The same where the table lies on another device: only rows that are owned travel."""
    positions = owned.reshape(-1).nonzero().squeeze(1)
    found = weight_NE.index_select(0, rows.reshape(-1)[positions].to(weight_NE.device)).to(rows.device)
    output = found.new_zeros(*rows.shape, weight_NE.shape[1])
    output.view(-1, weight_NE.shape[1]).index_copy_(0, positions, found)
    return output
