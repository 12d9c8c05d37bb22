"""From each rank's incomplete embedding to the embedding: on every rank, or split along the sequence.

Shape suffixes: W ranks, C tokens of a chunk, T tokens in all, E columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.partition import VocabPartition
from shared.sequence import chunk_shape, resolve_seq_dim
from torch_impl.exchange import ChunkRoutes, distinct_ids, gather_everywhere
from torch_impl.faults import naming_the_operation
from torch_impl.local.sums import row_gradient, sum_distinct, sum_rows
from torch_impl.placement import find_group
from torch_impl.rows import lookup_own

__all__ = ["ReductionOptions", "choose_exchange", "reduce_lookup", "worth_broadcasting"]


@dataclass(frozen=True)
class ReductionOptions:
    """How a lookup is reduced.

    Attributes:
        reduction: ``"all_reduce"`` or ``"reduce_scatter"``.
        exchange: ``"dense"``, ``"routed"`` or ``"auto"``.
        seq_dim: for reduce_scatter, the dimension of the ids that is split.
        padding_idx: a global id whose row gets no gradient, or None.
        sparse: make the gradient a sparse COO tensor of the distinct rows.
        group_name: the process group; None where there is one rank.
        rank: this rank, which the group must agree with; None takes the group's.
    """

    reduction: str
    exchange: str
    seq_dim: int
    padding_idx: int | None
    sparse: bool
    group_name: str | None
    rank: int | None = None

    def as_arguments(self) -> tuple[Any, ...]:
        """What an operator takes of them."""
        return self.reduction, self.exchange, self.seq_dim, self.padding_idx, self.group_name


def choose_exchange(exchange: str, num_tokens: int, row_bytes: int, device: str) -> str:
    """``"dense"`` or ``"routed"``: what ``"auto"`` stands for, the same on every rank.

    Routed, where the embedding of all tokens has 1 MiB or more: from there on it was faster over gloo for w = 2, 4 and 8,
    uniform and Zipf-distributed ids, float32 and bfloat16, forward by up to 9 times, and never behind by more than a
    tenth; below, now one and now the other was faster. (``python -m benchmarks`` measures it again.) Of a large all_reduce,
    ``worth_broadcasting`` has the last word. On accelerators, where nothing has been measured and where routing makes the
    host wait for the device, ``"auto"`` stands for dense.

    Args:
        exchange: returned as it is, unless it is ``"auto"``.
        num_tokens: ids in all.
        row_bytes: bytes of a row.
        device: the type of device the table lies on.
    """
    if exchange != "auto":
        return exchange
    return "routed" if device == "cpu" and num_tokens * row_bytes >= 2**20 else "dense"


def worth_broadcasting(num_tokens: int, num_distinct: int, row_bytes: int) -> bool:
    """Whether ``"auto"`` keeps to routed for an all_reduce, once the ids are known to all ranks: the same on each.

    Not from 32 MiB on, where nearly no token repeats: there an all_reduce took 0.6 to 1.0 of the broadcasts' time over
    gloo at w = 2, 4 and 8; where tokens repeat, or below, 1.0 to 2.0.

    Args:
        num_tokens: ids in all.
        num_distinct: of which so many are distinct.
        row_bytes: bytes of a row.
    """
    return num_tokens * row_bytes < 2**25 or 4 * num_distinct <= 3 * num_tokens


def reduce_lookup(weight: Tensor, ids: Tensor, partition: VocabPartition, options: ReductionOptions) -> Tensor:
    """The embedding of ``ids``, int64: whole for all_reduce, this rank's chunk for reduce_scatter."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in (weight, ids))
    if plain and not torch.compiler.is_compiling():
        return _Apply.apply(weight, _plan(weight.device, weight, ids, partition, options))
    if options.sparse:
        raise ValueError("sparse=True cannot be compiled: use sparse=False, or keep the embedding out of the graph")
    sizes = partition.vocab_size, partition.world_size, partition.padded_vocab_size
    return torch.ops.pve.reduce_lookup(weight, ids, *sizes, *options.as_arguments())


class _AllReduce:
    """Everything on every rank. Its gradient is local: each rank has the whole of ``grad_output``."""

    def __init__(
        self, ids: Tensor, device: torch.device, partition: VocabPartition, exchange: str, options: ReductionOptions
    ) -> None:
        self._partition, self._options = partition, options
        self._group = _group(partition, options)
        self._rank = 0 if self._group is None else self._group.rank()
        self._ids, self._output_device = ids.to(device, copy=True), ids.device  # the caller may write over them
        self._exchange = exchange

    def gather(self, weight: Tensor) -> Tensor:
        partition, ids, rank, group = self._partition, self._ids, self._rank, self._group
        if group is not None and self._exchange == "routed" and ids.numel():
            wanted, slots = distinct_ids(ids, partition)
            row_bytes = weight.shape[1] * weight.element_size()
            if self._options.exchange == "routed" or worth_broadcasting(ids.numel(), len(wanted), row_bytes):
                return gather_everywhere(weight, wanted, slots, partition, rank, group).to(self._output_device)
        output = lookup_own(weight, ids, partition, rank)
        if group is not None and ids.numel():
            with naming_the_operation("all_reduce of the embedding's forward (dense)", group):
                dist.all_reduce(_as_integers(output), group=group)
        return output.to(self._output_device)

    def scatter(self, grad_output: Tensor) -> Tensor:
        partition, ids = self._partition, self._ids
        rows, counted = partition.clipped_rows(ids, self._rank)
        if self._options.padding_idx is not None:
            counted = counted & (ids != self._options.padding_idx)
        return sum_rows(
            grad_output.to(ids.device), rows, counted, partition.rows_per_rank, ids.device, self._options.sparse
        )


class _ReduceScatter:
    """Each rank's chunk of the sequence. Its gradient brings each rank what the chunks have for the rows it owns.

    A row's gradients are added chunk by chunk, and then the chunks' sums in order: the same by either exchange.
    """

    def __init__(
        self, ids: Tensor, device: torch.device, partition: VocabPartition, exchange: str, options: ReductionOptions
    ) -> None:
        self._partition, self._options = partition, options
        group = _group(partition, options)
        assert group is not None
        self._group, self._rank, self._output_device = group, group.rank(), ids.device
        w = partition.world_size
        self._shape = chunk_shape(ids.shape, options.seq_dim, w)
        dim = resolve_seq_dim(ids.dim(), options.seq_dim)
        ids_by_chunk = ids.to(device, copy=True).unflatten(dim, (w, self._shape[dim])).movedim(dim, 0)
        self._ids_WC = ids_by_chunk.reshape(w, ids.numel() // w)
        self._routes: ChunkRoutes | None = None
        if ids.numel() and exchange == "routed":
            self._routes = ChunkRoutes(self._ids_WC, partition, self._rank, group)

    def gather(self, weight: Tensor) -> Tensor:
        partition, ids_WC = self._partition, self._ids_WC
        if self._routes is not None:
            output = self._routes.gather(weight, self._shape)
        else:
            partial = lookup_own(weight, ids_WC, partition, self._rank)
            output = partial.new_empty(*self._shape, weight.shape[1])
            if ids_WC.numel():
                with naming_the_operation("reduce_scatter of the embedding's forward (dense)", self._group):
                    partial_TE = _as_integers(partial.flatten(0, 1))
                    dist.reduce_scatter_single(_as_integers(output), partial_TE, group=self._group)
        return output.to(self._output_device)

    def scatter(self, grad_output: Tensor) -> Tensor:
        partition, ids_WC, options, n = self._partition, self._ids_WC, self._options, self._partition.rows_per_rank
        grad_CE = grad_output.to(ids_WC.device).reshape(-1, grad_output.shape[-1]).contiguous()
        padding_row = None if options.padding_idx is None else partition.local_ids(options.padding_idx, self._rank)
        if self._routes is not None:
            rows, sums = self._routes.rows_to_send, self._routes.scatter(grad_CE)
        else:
            grad_TE = grad_CE.new_empty(ids_WC.numel(), grad_CE.shape[1])
            if ids_WC.numel():
                with naming_the_operation("all_gather of the embedding's backward (dense)", self._group):
                    dist.all_gather_single(_as_integers(grad_TE), _as_integers(grad_CE), group=self._group)
            rows, owned = partition.clipped_rows(ids_WC, self._rank)
            if grad_TE.device.type != "cpu" and not options.sparse:
                # Without the host having to wait for the numbers of rows.
                counted = owned if padding_row is None else owned & (rows != padding_row)
                return sum_rows(grad_TE, rows, counted, n, grad_TE.device, False)
            chunk = torch.arange(len(ids_WC), device=ids_WC.device).unsqueeze(1)
            keys, sums = sum_distinct(grad_TE, (chunk * n + rows).reshape(-1), owned.reshape(-1), wide=True)
            rows = keys % n
        counted = torch.ones_like(rows, dtype=torch.bool) if padding_row is None else rows != padding_row
        distinct, sums = sum_distinct(sums, rows, counted)
        return row_gradient(distinct, sums.to(grad_CE.dtype), n, options.sparse)


_Plan = _AllReduce | _ReduceScatter


def _plan(
    device: torch.device, rows: Tensor, ids: Tensor, partition: VocabPartition, options: ReductionOptions
) -> _Plan:
    """What to send where; ``rows`` are some of the table's or of its gradient's, on whatever device."""
    exchange = choose_exchange(options.exchange, ids.numel(), rows.shape[-1] * rows.element_size(), device.type)
    all_reduce = options.reduction == "all_reduce" or partition.world_size == 1
    return (_AllReduce if all_reduce else _ReduceScatter)(ids, device, partition, exchange, options)


def _group(partition: VocabPartition, options: ReductionOptions) -> dist.ProcessGroup | None:
    if partition.world_size == 1:
        return None
    assert options.group_name is not None
    return find_group(options.group_name, options.rank, partition.world_size)


def _as_integers(rows: Tensor) -> Tensor:
    """The same memory as integers: added up with zeros, every bit stays as it is, of NaN and -0.0 too."""
    flat = rows.view(-1)
    width = rows.element_size()
    if width == 2:
        return flat.view(torch.int32 if rows.shape[-1] % 2 == 0 else torch.uint8)
    return flat.view(torch.int32 if width == 4 else torch.int64)


class _Apply(torch.autograd.Function):
    """A plan's linear map, from a rank's rows to the embedding."""

    @staticmethod
    def forward(weight: Tensor, plan: _Plan) -> Tensor:
        return plan.gather(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _Transpose.apply(grad_outputs[0], ctx.plan), None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return ctx.plan.gather(grad_inputs[0])


class _Transpose(torch.autograd.Function):
    """Its transpose, from the gradient of the embedding to that of the rank's rows."""

    @staticmethod
    def forward(grad_output: Tensor, plan: _Plan) -> Tensor:
        return plan.scatter(grad_output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plan = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _Apply.apply(grad_outputs[0], ctx.plan), None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return ctx.plan.scatter(grad_inputs[0])


@torch.library.custom_op("pve::reduce_lookup", mutates_args=())
def _reduce_lookup(
    weight: Tensor,
    ids: Tensor,
    vocab_size: int,
    world_size: int,
    padded_vocab_size: int,
    reduction: str,
    exchange: str,
    seq_dim: int,
    padding_idx: int | None,
    group_name: str | None,
) -> Tensor:
    """``reduce_lookup`` as an operator, so that compiled graphs can hold it, whatever sizes the ids lead to inside."""
    options = ReductionOptions(reduction, exchange, seq_dim, padding_idx, False, group_name)
    partition = VocabPartition(vocab_size, world_size, padded_vocab_size)
    return _plan(weight.device, weight, ids, partition, options).gather(weight)


@_reduce_lookup.register_fake
def _(
    weight: Tensor, ids: Tensor, _vocab_size: int, world_size: int, _padded: int, reduction: str, *options: Any
) -> Tensor:
    shape = ids.shape if reduction == "all_reduce" else chunk_shape(ids.shape, options[1], world_size)
    return weight.new_empty(*shape, weight.shape[1], device=ids.device)


@torch.library.custom_op("pve::reduce_lookup_grad", mutates_args=())
def _reduce_lookup_grad(
    grad_output: Tensor,
    ids: Tensor,
    device: torch.device,
    vocab_size: int,
    world_size: int,
    padded_vocab_size: int,
    reduction: str,
    exchange: str,
    seq_dim: int,
    padding_idx: int | None,
    group_name: str | None,
) -> Tensor:
    options = ReductionOptions(reduction, exchange, seq_dim, padding_idx, False, group_name)
    partition = VocabPartition(vocab_size, world_size, padded_vocab_size)
    return _plan(device, grad_output, ids, partition, options).scatter(grad_output)


@_reduce_lookup_grad.register_fake
def _(
    grad_output: Tensor,
    ids: Tensor,
    device: torch.device,
    _vocab_size: int,
    world_size: int,
    padded_vocab_size: int,
    *_options: Any,
) -> Tensor:
    return grad_output.new_empty(padded_vocab_size // world_size, grad_output.shape[-1], device=device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, *arguments = inputs
    ctx.arguments = weight.device, *arguments
    ctx.save_for_backward(ids)


def _grad(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    grad = torch.ops.pve.reduce_lookup_grad(grad_output, ids, *ctx.arguments)
    return grad, None, *[None] * (len(ctx.arguments) - 1)


_reduce_lookup.register_autograd(_grad, setup_context=_keep)
