"""Rows of a table by their number, and the gradient: the sum of each row's occurrences.

Shape suffixes: N rows of the rank's table, E columns; the ids' own dimensions are flattened to T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from shared.bits import STORED_DTYPES
from torch_impl import gpu

__all__ = [
    "differentiable",
    "fill_rows",
    "into_place",
    "lookup_rows",
    "memory_of",
    "row_gradient",
    "row_sum",
    "sum_distinct",
    "sum_rows",
    "take_rows",
    "transformed",
]

_BYTES = 1 << 24
_PART_BYTES = 1 << 19


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
    if counted is None and not sparse and _few(weight, rows, owned):
        return torch.where(owned.unsqueeze(-1), torch.embedding(weight, rows), 0)
    # What Function.apply comes to where no transform is active; to find that out again takes it 2 us.
    return super(torch.autograd.Function, _Lookup).apply(weight, (rows, owned, counted), sparse)


def _few(weight: Tensor, rows: Tensor, owned: Tensor) -> bool:
    """Whether PyTorch's own gradient is exact, and the batch so small that a Python function in the graph costs more.

    PyTorch adds 16-bit gradients up in their own dtype: exact, if no row is asked for twice.
    """
    itemsize, (num_rows, emb_size) = weight.dtype.itemsize, weight.shape
    if rows.numel() * emb_size * itemsize > _FEW_BYTES or num_rows * emb_size * itemsize >= _MANY_BYTES:
        return False
    if not _on_cpu(weight, rows) or (itemsize < 4 and rows.numel() > _FEW_TOKENS):
        return False
    if itemsize >= 4 or rows.numel() == 1:
        return True
    asked_for = rows[owned].tolist()
    return len(asked_for) == len(set(asked_for))


_FEW_BYTES = 1 << 17
_FEW_TOKENS = 64


def differentiable(tensor: Tensor) -> bool:
    """Whether reverse or forward mode has to know what is done with the tensor. To ask takes no time; its nodes do."""
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether a compiler, a transform of torch.func or forward mode is at work, which only ``take_rows`` has rules for."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


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


def into_place(weight: Tensor) -> Tensor:
    """The same table, of which a sparse gradient is added to ``weight.main_grad`` or ``weight.grad`` as soon as it is known.

    That takes as long as the rows it has, not as long as the table; autograd itself is handed nothing.

    Raises:
        ValueError: somebody waits for the gradient that autograd would have handed on.
    """
    from torch.nn.parallel import DistributedDataParallel

    problem = None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(weight) not in _PLAIN:
        problem = "it works in eager mode only"
    elif not weight.is_leaf:
        problem = "the table is computed, not a parameter"
    elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
        problem = "the table has gradient hooks, which would not be called"
    elif DistributedDataParallel._get_active_ddp_module() is not None:
        problem = "DistributedDataParallel waits for the gradient: use fully_shard, or all-reduce the buffer yourself"
    if problem is not None:
        raise ValueError(f"gradient_accumulation_fusion must be False here: {problem}")
    return _IntoPlace.apply(weight)


class _IntoPlace(torch.autograd.Function):
    """The identity, whose backward adds rows to where the parameter keeps its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError("gradient_accumulation_fusion must be False where gradients are differentiated again")
        weight, grad = ctx.weight, grad_outputs[0]
        rows, values = grad._indices()[0], grad._values()
        buffer = getattr(weight, "main_grad", None)
        if buffer is None:
            if weight.grad is None:
                weight.grad = _zeros(tuple(weight.shape), weight)
            buffer = weight.grad
        if len(rows):
            buffer.index_copy_(0, rows, buffer.index_select(0, rows).add_(values))


def _batch_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


_PLAIN = (Tensor, torch.nn.Parameter)


def _on_cpu(one: Tensor, other: Tensor) -> bool:
    """Whether what is done may depend on the data without anything having to wait for it.

    A graph that is being traced has no data, nor has a tensor that stands for another.
    """
    both = one.is_cpu and other.is_cpu and type(one) in _PLAIN and type(other) in _PLAIN
    return both and not torch.compiler.is_compiling()


def _owned_rows_only(device: torch.device, one: Tensor, other: Tensor) -> bool:
    """Whether to work on the owned positions alone, whose number only the data tell.

    Worth it on the CPU and between devices. On an accelerator it would make the host wait for the device: there every
    position is worked on, under a mask.
    """
    if torch.compiler.is_compiling() or not (type(one) in _PLAIN and type(other) in _PLAIN):
        return False
    devices = {device, one.device, other.device}
    return (len(devices) > 1 or one.is_cpu) and torch.device("meta") not in devices


def lookup_rows(weight_NE: Tensor, rows: Tensor, owned: Tensor) -> Tensor:
    """``take_rows`` without a gradient."""
    # None of these ends in a view: FSDP2 warns of modules that return one.
    if not _on_cpu(weight_NE, rows):
        if _owned_rows_only(weight_NE.device, weight_NE, rows):
            return _travelling_rows(weight_NE, rows, owned)
        if gpu.serves(weight_NE, rows) and not torch.compiler.is_compiling():  # a compiler makes one kernel of the rest
            from torch_impl.gpu.kernels import take_owned_rows

            return take_owned_rows(weight_NE, torch.where(owned, rows, -1), 0, len(weight_NE), None, False)[0]
        return F.embedding(rows, weight_NE).masked_fill(~owned.unsqueeze(-1), 0)
    here, tokens, emb_size = int(owned.count_nonzero()), rows.numel(), weight_NE.shape[1]
    row_bytes = emb_size * weight_NE.element_size()
    if here == 0:
        return _zeros((*rows.shape, emb_size), weight_NE)
    if tokens * row_bytes < _MANY_BYTES:
        output = torch.embedding(weight_NE, rows)
    else:
        output = _mapped((*rows.shape, emb_size), weight_NE.dtype, huge_pages=True)
        torch.index_select(weight_NE.detach(), 0, rows.reshape(-1), out=output.view(-1, emb_size))
    if here == tokens:
        return output
    if (tokens - here) * _FILL_BYTES < tokens * row_bytes:
        output.view(-1, emb_size).index_fill_(0, (~owned).reshape(-1).nonzero().squeeze(1), 0)
    else:
        # Bits times one or zero, as integers: exact, NaN or not, and by far the fastest way to wipe many rows.
        output.view(_WORDS[math.gcd(row_bytes, 4)]).mul_(owned.unsqueeze(-1))
    return output


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


def sum_rows(
    grad_output: Tensor, rows: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
) -> Tensor:
    """For each of ``num_rows`` rows, the sum of its gradients, on ``device``: the transpose of ``lookup_rows``."""
    emb_size = grad_output.shape[-1]
    grad_TE = grad_output.reshape(-1, emb_size)
    rows_T, counted_T = rows.reshape(-1), counted.reshape(-1)
    if sparse or _owned_rows_only(device, grad_output, rows):
        if torch.compiler.is_compiling():
            raise ValueError("sparse=True cannot be compiled: use sparse=False, or keep the embedding out of the graph")
        if not sparse and _small(grad_TE, rows_T, num_rows, device):
            wide_TE = grad_TE.float() if grad_TE.dtype.itemsize < 4 else grad_TE
            rows_T = torch.where(counted_T, rows_T, -1)  # the row that this operation leaves out
            sums = torch.ops.aten.embedding_dense_backward(wide_TE, rows_T, num_rows, -1, False)
            return sums.to(grad_TE.dtype)
        distinct, sums = sum_distinct(grad_TE, rows_T, counted_T)
        return row_gradient(distinct.to(device), sums.to(device), num_rows, sparse)
    if device == rows.device and gpu.serves(grad_TE, rows_T):
        return gpu.sum_rows_by_key(grad_TE, torch.where(counted_T, rows_T, num_rows), num_rows)
    dtype = grad_TE.dtype
    grad_TE = grad_TE.to(torch.float32 if dtype.itemsize < 4 else dtype)
    grad_TE = grad_TE.masked_fill(~counted_T.unsqueeze(1), 0).to(device)
    return torch.ops.aten.embedding_dense_backward(grad_TE, rows_T.to(device), num_rows, -1, False).to(dtype)


def _small(grad_TE: Tensor, rows_T: Tensor, num_rows: int, device: torch.device) -> bool:
    """Whether to add the gradients up where they belong is faster than to sort them: bits are the same."""
    size = num_rows * grad_TE.shape[1]
    most = 1 << 16 if grad_TE.dtype.itemsize < 4 else _MANY_BYTES // grad_TE.dtype.itemsize
    return size < most and len(rows_T) <= _SMALL_TOKENS and device.type == "cpu" and grad_TE.is_cpu and rows_T.is_cpu


_SMALL_TOKENS = 1 << 14


def row_gradient(distinct: Tensor, sums: Tensor, num_rows: int, sparse: bool) -> Tensor:
    """The gradient ``[num_rows, E]`` whose rows ``distinct``, ascending, are ``sums`` and whose others are zero."""
    size = (num_rows, sums.shape[1])
    if sparse:
        index = distinct.unsqueeze(0)
        return torch.sparse_coo_tensor(index, sums, size, is_coalesced=True, check_invariants=False)
    return _zeros(size, sums, 4 * len(distinct) > num_rows).index_copy_(0, distinct, sums)


def _zeros(size: tuple[int, ...], like: Tensor, most_are_written: bool = False) -> Tensor:
    """Zeros of that size, of the dtype and on the device of ``like``.

    Many of them, on a CPU, are the operating system's, there once they are touched: a gradient then costs as much as its
    rows that are not zero. torch.zeros writes them all (46 ms for 128 MB of which nothing is touched).
    """
    if like.device.type != "cpu" or math.prod(size) * like.element_size() < _MANY_BYTES:
        return like.new_zeros(size)
    return _mapped(size, like.dtype, most_are_written)


_MANY_BYTES = 1 << 25
"""From there on the C library takes fresh memory from the operating system for each tensor, and gives it back."""


def _mapped(size: tuple[int, ...], dtype: torch.dtype, huge_pages: bool) -> Tensor:
    """Zeros in memory of their own.

    In huge pages, where nearly all of it will be written: to fault so many small ones in takes longer than the writing.
    In small ones, where little will be: a huge page is cleared as a whole.
    """
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor: Any = torch.empty(0, dtype=dtype)
    return tensor.set_(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage(), 0, size)


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


def _parts(offsets: Tensor, count: int, row_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs ``[first, last)`` and their items ``[start, stop)``, half a megabyte or so at a time, which a cache holds.

    All at once on an accelerator, which has no such cache and whose numbers the host would have to wait for.
    """
    if offsets.device.type != "cpu":
        yield 0, len(offsets), 0, count
        return
    starts = offsets.numpy()
    cuts = np.unique(np.searchsorted(starts, np.arange(0, count, max(1, _PART_BYTES // row_bytes))))
    bounds = [*starts.tolist(), count]
    for first, last in itertools.pairwise([*cuts.tolist(), len(starts)]):
        yield first, last, bounds[first], bounds[last]
