"""The lookup as a pure function of one rank's rows, with its gradient.

Shape suffixes: N rows of the rank's table, E columns, ``*`` the ids' own dimensions, flattened to T tokens inside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.checks import check_choice, check_padding_idx, ids_type_error
from shared.ids import check_ids_valid, widen
from shared.partition import VocabPartition

__all__ = ["partial_lookup"]


def partial_lookup(
    weight: Tensor,
    ids: Tensor,
    partition: VocabPartition,
    rank: int,
    *,
    invalid_ids: str = "zero",
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look up the ids that ``rank`` owns; every other id gets a row of +0.0. The ranks' results sum to the embedding.

    Args:
        weight: the rank's own rows, ``[partition.rows_per_rank, emb_size]``, any floating dtype.
        ids: global ids, any shape, any integer dtype. They are not modified, and no dtype wraps.
        partition: who owns what.
        rank: whose rows ``weight`` holds.
        invalid_ids: what an id outside ``[0, vocab_size)``, negative ones included, gives on every rank: ``"zero"``, a
            row of +0.0; ``"error"``, an IndexError (which waits for the device to know).
        padding_idx: a global id whose row gets no gradient. Its row is looked up like any other.
        sparse: make the weight's gradient a sparse COO tensor of the distinct rows asked for (not under torch.compile).

    Returns:
        ``[*ids.shape, emb_size]`` on the ids' device in the weight's dtype. Rows are copied bit for bit. Where the
        weight lives on another device, only the rows it owns travel.

    The weight's gradient sums a row's occurrences in float32 for 16-bit tables (in the table's dtype otherwise) and rounds
    once. Eager CPU sums run in the order of the tokens. First and second derivatives are defined, forward mode too.

    Raises:
        TypeError: ids are not a tensor of integers.
        ValueError: ``weight`` does not have ``partition.rows_per_rank`` rows; another argument is out of range.
        IndexError: with ``invalid_ids="error"``, naming the first such id, its position and the legal range.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> table = torch.arange(8.0).reshape(4, 2)
        >>> halves = VocabPartition(vocab_size=4, world_size=2)
        >>> ids = torch.tensor([0, 3, 2])
        >>> partial_lookup(table[2:], ids, halves, rank=1)
        tensor([[0., 0.],
                [6., 7.],
                [4., 5.]])
        >>> partial_lookup(table[:2], ids, halves, 0) + partial_lookup(table[2:], ids, halves, 1)
        tensor([[0., 1.],
                [6., 7.],
                [4., 5.]])
    """
    if weight.dim() != 2 or weight.shape[0] != partition.rows_per_rank:
        raise ValueError(
            f"weight must hold the rank's own rows, [{partition.rows_per_rank}, emb_size], got {tuple(weight.shape)}"
        )
    check_choice("invalid_ids", invalid_ids, ("zero", "error"))
    check_padding_idx(padding_idx, partition.vocab_size)
    return lookup_checked(weight, ids, partition, rank, invalid_ids, padding_idx, sparse)


def lookup_checked(
    weight: Tensor,
    ids: Tensor,
    partition: VocabPartition,
    rank: int | Tensor,
    invalid_ids: str,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    """``partial_lookup`` for a caller that has checked all but the ids; ``rank`` may be a 0-d tensor."""
    if not isinstance(ids, Tensor):
        raise ids_type_error(type(ids).__name__, "a torch.Tensor")
    if ids.dtype not in _INTEGER_DTYPES:
        raise ids_type_error(f"dtype {ids.dtype}", "a tensor")
    ids = torch.ops.pve.check_ids(ids, partition.vocab_size) if invalid_ids == "error" else widen(ids)
    local, owned = partition.local_ids(ids, rank), partition.owns(ids, rank)
    counted = None if padding_idx is None else owned & (ids != padding_idx)
    lookup = _TracedLookup if torch.compiler.is_compiling() else _Lookup
    return lookup.apply(weight, local, owned, counted, sparse)


_INTEGER_DTYPES = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


@torch.library.custom_op("pve::check_ids", mutates_args=())
def _check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids as int64, once all of them are known to be valid. An operator, so that compiled graphs can hold it."""
    wide = widen(ids)
    if ((wide < 0) | (wide >= vocab_size)).any():
        check_ids_valid(ids.cpu().numpy(), vocab_size)
    return wide.clone() if wide is ids else wide


@_check_ids.register_fake
def _(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int64)


class _TracedLookup(torch.autograd.Function):
    """Rows of the table to the positions that own one, in the part of autograd that torch.compile traces.

    ``counted`` says which positions have a gradient; None: those that own a row.
    """

    @staticmethod
    def forward(weight: Tensor, local: Tensor, owned: Tensor, counted: Tensor | None, sparse: bool) -> Tensor:
        return _lookup_rows(weight, local, owned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, local, owned, counted, ctx.sparse = inputs
        ctx.save_for_backward(local, owned if counted is None else counted)
        ctx.num_rows, ctx.device = weight.shape[0], weight.device

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        local, counted = ctx.saved_tensors
        grad = _sum_rows(grad_outputs[0], local, counted, ctx.num_rows, ctx.device, ctx.sparse)
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
        return _lookup_rows(grad_inputs[0], *ctx.saved_tensors)

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
        return _sum_rows(grad_output, local, counted, num_rows, device, sparse)

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
        return _sum_rows(grad_inputs[0], local, counted, ctx.num_rows, ctx.device, ctx.sparse)

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


def _lookup_rows(weight_NE: Tensor, local: Tensor, owned: Tensor) -> Tensor:
    local_T, owned_T = local.reshape(-1), owned.reshape(-1)
    if not _owned_rows_only(weight_NE.device, weight_NE, local):
        safe_T = local_T.masked_fill(~owned_T, 0).to(weight_NE.device)
        rows = weight_NE.index_select(0, safe_T).to(local.device)
        output_TE = rows.masked_fill(~owned_T.unsqueeze(1), 0)
    elif weight_NE.device == local.device and 2 * int(owned_T.count_nonzero()) > owned_T.numel():
        # Mostly owned, as on rank 0 with real text: one gather of everything, then wipe the few foreign rows.
        output_TE = weight_NE.index_select(0, local_T.masked_fill(~owned_T, 0))
        output_TE.index_fill_(0, (~owned_T).nonzero().squeeze(1), 0)
    else:
        positions = owned_T.nonzero().squeeze(1)
        rows = weight_NE.index_select(0, local_T[positions].to(weight_NE.device)).to(local.device)
        output_TE = rows.new_zeros(local_T.numel(), weight_NE.shape[1]).index_copy_(0, positions, rows)
    return output_TE.view(*local.shape, weight_NE.shape[1])


def _sum_rows(
    grad_output: Tensor, local: Tensor, counted: Tensor, num_rows: int, device: torch.device, sparse: bool
) -> Tensor:
    emb_size = grad_output.shape[-1]
    grad_TE = grad_output.reshape(-1, emb_size)
    local_T, counted_T = local.reshape(-1), counted.reshape(-1)
    if sparse or _owned_rows_only(device, grad_output, local):
        if torch.compiler.is_compiling():
            raise ValueError("sparse=True cannot be compiled: use sparse=False, or keep the embedding out of the graph")
        distinct, sums = _sum_distinct(grad_TE, local_T, counted_T)
        distinct, sums = distinct.to(device), sums.to(device)
        if sparse:
            index, size = distinct.unsqueeze(0), (num_rows, emb_size)
            return torch.sparse_coo_tensor(index, sums, size, is_coalesced=True, check_invariants=False)
        return sums.new_zeros(num_rows, emb_size).index_copy_(0, distinct, sums)
    dtype = grad_TE.dtype
    grad_TE = grad_TE.to(torch.float32 if dtype.itemsize < 4 else dtype)
    grad_TE = grad_TE.masked_fill(~counted_T.unsqueeze(1), 0).to(device)
    safe_T = local_T.masked_fill(~counted_T, 0).to(device)
    return torch.ops.aten.embedding_dense_backward(grad_TE, safe_T, num_rows, -1, False).to(dtype)


def _sum_distinct(grad_TE: Tensor, local_T: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows asked for, ascending, and the sum of each one's gradients in the order of the tokens."""
    positions = counted_T.nonzero().squeeze(1)
    rows, order = local_T[positions].sort(stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    if distinct.numel() == 0:
        return distinct, grad_TE.new_zeros(0, grad_TE.shape[1])
    tokens, offsets = positions[order], counts.cumsum(0) - counts
    if grad_TE.dtype == torch.bfloat16:
        # embedding_bag adds in float32, but rounds ties to bfloat16 upwards, not to even as every cast does.
        rows = grad_TE.index_select(0, tokens).float()
        return distinct, F.embedding_bag(
            torch.arange(len(rows), device=rows.device), rows, offsets, mode="sum"
        ).bfloat16()
    return distinct, F.embedding_bag(tokens, grad_TE, offsets, mode="sum")
