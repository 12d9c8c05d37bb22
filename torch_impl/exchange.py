"""Lookups over all ranks' rows: all_reduce, reduce_scatter and all_to_all.

Each reduction is one operator with its transpose. Every rank knows or gathers all ids, and computes from them what it
sends and receives. Rows travel bit for bit.
Shape suffixes: W ranks, C tokens of a chunk, T tokens in all, E columns, K distinct rows. With all_to_all a chunk is
one rank's ids, padded with -1 to the longest.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared.config import EmbeddingConfig
from shared.ids import check_ids_valid
from shared.sequence import chunk_shape, resolve_seq_dim
from torch_impl.agreement import naming_the_operation
from torch_impl.kernels import cpu
from torch_impl.lookup import eager_mode_only, gather, gradient_keys, row_keys, sparse_gradient
from torch_impl.private_api import all_gather, reduce_scatter
from torch_impl.process_group import find_group

__all__ = ["choose_exchange", "reduced_lookup"]


def choose_exchange(exchange: str, device: str) -> str:
    """Resolve ``"auto"``: routed on CPUs, dense on accelerators.

    Over four gloo processes and 8192 tokens routed was faster in every published case (``python -m benchmarks``). On an
    accelerator it makes the host wait for the number of rows; it was not measured there.
    """
    if exchange != "auto":
        return exchange
    return "routed" if device == "cpu" else "dense"


def reduced_lookup(
    weight: Tensor,
    ids: Tensor,
    config: EmbeddingConfig,
    group_name: str,
    zero_padded: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look up ids in a table split over a process group.

    Args:
        weight, zero_padded, sparse: as in ``torch_impl.lookup.lookup``.
        ids: int64, any shape; the same on all ranks, except with ``"all_to_all"``.
        config: the options; ``reduction`` is not ``"none"``.
        group_name: the ranks.

    Returns:
        ``[*ids.shape, E]`` on the device of the ids; for ``"reduce_scatter"`` this rank's chunk of it.

    Raises:
        RuntimeError: a collective failed; the message names it.
    """
    ids_here = ids.to(weight.device, copy=True)  # the caller may overwrite them before backward
    output = _ReducedLookup.apply(weight, ids_here, zero_padded, config.text, group_name, sparse)
    return output.to(ids.device)


class _ReducedLookup(torch.autograd.Function):
    """Lookup over the ranks, linear in the rows; transpose: ``_ReducedScatterAdd``."""

    @staticmethod
    def forward(
        weight: Tensor, ids: Tensor, zero_padded: Tensor | None, config: str, group_name: str, sparse: bool
    ) -> Tensor:
        table = weight if zero_padded is None else zero_padded
        return torch.ops.pve.reduced_lookup(table, ids, weight.shape[0], config, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ids, _zero_padded, ctx.config, ctx.group_name, ctx.sparse = inputs
        ctx.num_rows = weight.shape[0]
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.sparse:
            if torch.is_grad_enabled():
                raise ValueError("sparse must be False where gradients of a reduction are differentiated again")
            config = EmbeddingConfig.from_text(ctx.config)
            with eager_mode_only():
                rows = _sums_of_own_rows(grad_outputs[0], ids, config, ctx.group_name)
            grad = sparse_gradient(*rows, ctx.num_rows)
        else:
            grad = _ReducedScatterAdd.apply(grad_outputs[0], ids, ctx.num_rows, ctx.config, ctx.group_name)
        return grad, None, None, None, None, None


class _ReducedScatterAdd(torch.autograd.Function):
    """Gradient of a rank's rows; its transpose is ``_ReducedLookup``."""

    @staticmethod
    def forward(grad_output: Tensor, ids: Tensor, num_rows: int, config: str, group_name: str) -> Tensor:
        return torch.ops.pve.reduced_scatter_add(grad_output, ids, num_rows, config, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _grad_output, ids, _num_rows, ctx.config, ctx.group_name = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        config = replace(EmbeddingConfig.from_text(ctx.config), invalid_ids="zero")  # forward has checked them
        if config.padding_idx is not None:  # its gradient is always zero
            ids = ids.masked_fill(ids == config.padding_idx, -1)
        grad = _ReducedLookup.apply(grad_outputs[0], ids, None, config.text, ctx.group_name, False)
        return grad, None, None, None, None


@torch.library.custom_op("pve::reduced_lookup", mutates_args=())
def _reduced_lookup(table: Tensor, ids: Tensor, num_rows: int, config: str, group_name: str) -> Tensor:
    known = EmbeddingConfig.from_text(config)
    group = find_group(group_name, None, known.world_size)
    routed = choose_exchange(known.exchange, table.device.type) == "routed"
    if known.reduction == "all_reduce" and ids.numel():
        if routed:
            return _routed_all_reduce(table, ids, known, group)
        return _dense_all_reduce(table, ids, num_rows, known, group)
    shape = _output_shape(ids, known)
    ids_WC = _by_chunk(ids, known, group)
    if ids_WC.numel() == 0:
        return table.new_empty(*shape, table.shape[1])
    if routed:
        return _routed_reduce_scatter(table, ids_WC, shape, known, group)
    return _dense_reduce_scatter(table, ids_WC, num_rows, shape, known, group)


@_reduced_lookup.register_fake
def _(table: Tensor, ids: Tensor, num_rows: int, config: str, group_name: str) -> Tensor:
    return table.new_empty(*_output_shape(ids, EmbeddingConfig.from_text(config)), table.shape[1])


@torch.library.custom_op("pve::reduced_scatter_add", mutates_args=())
def _reduced_scatter_add(grad_output: Tensor, ids: Tensor, num_rows: int, config: str, group_name: str) -> Tensor:
    known = EmbeddingConfig.from_text(config)
    if grad_output.device.type != "cpu" and choose_exchange(known.exchange, grad_output.device.type) == "dense":
        # One sum of all tokens: the host does not wait for the number of rows.
        group = find_group(group_name, None, known.world_size)
        ids_T, grad_TE = ids.reshape(-1), grad_output.reshape(-1, grad_output.shape[-1])
        if known.reduction != "all_reduce":
            ids_WC = _by_chunk(ids, known, group)
            ids_T, grad_TE = ids_WC.reshape(-1), _all_gather(grad_TE, ids_WC.shape[1], group)
        keys_T = gradient_keys(row_keys(ids_T, known, group.rank(), num_rows), ids_T, known, num_rows)
        return torch.ops.pve.scatter_add(grad_TE, keys_T, num_rows)
    distinct, sums = _sums_of_own_rows(grad_output, ids, known, group_name)
    return cpu.spread(distinct, sums, num_rows)


@_reduced_scatter_add.register_fake
def _(grad_output: Tensor, ids: Tensor, num_rows: int, config: str, group_name: str) -> Tensor:
    return grad_output.new_empty(num_rows, grad_output.shape[-1])


def _output_shape(ids: Tensor, config: EmbeddingConfig) -> tuple[int, ...]:
    if config.reduction != "reduce_scatter":
        return tuple(ids.shape)
    return chunk_shape(ids.shape, config.seq_dim, config.world_size)


def _by_chunk(ids: Tensor, config: EmbeddingConfig, group: dist.ProcessGroup) -> Tensor:
    """Ids by chunk, ``[W, C]``."""
    if config.reduction == "all_to_all":
        return _gather_ids(ids.reshape(-1), config, group)
    if config.reduction == "all_reduce":
        return ids.reshape(1, -1)
    dim, w = resolve_seq_dim(ids.dim(), config.seq_dim), config.world_size
    return ids.unflatten(dim, (w, ids.shape[dim] // w)).movedim(dim, 0).reshape(w, ids.numel() // w)


def _gather_ids(ids: Tensor, config: EmbeddingConfig, group: dist.ProcessGroup) -> Tensor:
    """Gather the ranks' own ids, padded with -1; the host waits.

    Raises:
        IndexError: on every rank, with ``invalid_ids="error"``; names the first rank with an invalid id.
    """
    counts_W = ids.new_empty(config.world_size)
    with naming_the_operation("all_gather of the numbers of ids (all_to_all)", group):
        all_gather(counts_W, ids.new_tensor([ids.numel()]), group=group)
    counts = counts_W.tolist()
    ids_WC = ids.new_empty(len(counts), max(counts))
    if ids_WC.numel():
        with naming_the_operation("all_gather of the ids (all_to_all)", group):
            all_gather(ids_WC.view(-1), F.pad(ids, (0, max(counts) - ids.numel()), value=-1), group=group)
    if config.invalid_ids == "error":
        for rank, count in enumerate(counts):
            try:
                check_ids_valid(ids_WC[rank, :count].cpu().numpy(), config.vocab_size)
            except IndexError as error:
                raise IndexError(f"of the ids that rank {rank} passed, flattened: {error}") from error
    return ids_WC


def _dense_all_reduce(
    table: Tensor, ids: Tensor, num_rows: int, config: EmbeddingConfig, group: dist.ProcessGroup
) -> Tensor:
    partial = gather(table, row_keys(ids, config, group.rank(), num_rows), num_rows, cpu.gather)
    with naming_the_operation("all_reduce of the embedding's forward (dense)", group):
        dist.all_reduce(_as_integers(partial), group=group)
    return partial


def _routed_all_reduce(table: Tensor, ids: Tensor, config: EmbeddingConfig, group: dist.ProcessGroup) -> Tensor:
    """Owners broadcast their distinct rows, which other ranks relay."""
    partition, rank = config.partition, group.rank()
    wanted_K, slots = _distinct(ids, config)
    bounds = _owner_bounds(wanted_K, config)
    rows_KE = cpu.empty((len(wanted_K), table.shape[1]), table.dtype, table.device)
    rows_KE[bounds[-1] :] = 0
    mine = slice(bounds[rank], bounds[rank + 1])
    torch.index_select(table, 0, wanted_K[mine] - partition.start(rank), out=rows_KE[mine])
    with naming_the_operation("broadcast of the embedding's forward (routed all_reduce)", group):
        under_way = [
            dist.broadcast(rows_KE[start:stop], group=group, group_src=owner, async_op=True)
            for owner, (start, stop) in enumerate(itertools.pairwise(bounds))
            if start < stop
        ]
        for work in under_way:
            work.wait()
    return cpu.gather(rows_KE, slots)


def _dense_reduce_scatter(
    table: Tensor,
    ids_WC: Tensor,
    num_rows: int,
    shape: tuple[int, ...],
    config: EmbeddingConfig,
    group: dist.ProcessGroup,
) -> Tensor:
    keys_T = row_keys(ids_WC.reshape(-1), config, group.rank(), num_rows)
    partial_TE = gather(table, keys_T, num_rows, cpu.gather)
    whole = math.prod(shape) == ids_WC.shape[1]
    # FSDP2 warns of an operator that returns a view, so none is made where nothing is padded.
    output = table.new_empty(*(shape if whole else ids_WC.shape[1:]), table.shape[1])
    with naming_the_operation("reduce_scatter of the embedding's forward (dense)", group):
        reduce_scatter(_as_integers(output), _as_integers(partial_TE), group=group)
    return output if whole else output[: math.prod(shape)].clone().view(*shape, table.shape[1])


def _routed_reduce_scatter(
    table: Tensor, ids_WC: Tensor, shape: tuple[int, ...], config: EmbeddingConfig, group: dist.ProcessGroup
) -> Tensor:
    """Owners send each distinct row once to each chunk that needs it."""
    rank = group.rank()
    wanted_K, slots_C = _distinct(ids_WC[rank], config)
    bounds = _owner_bounds(wanted_K, config)
    rows_to_send, send_counts = _rows_to_send(ids_WC, config, rank)
    rows_KE = cpu.empty((len(wanted_K), table.shape[1]), table.dtype, table.device)
    rows_KE[bounds[-1] :] = 0
    send, recv = cpu.gather(table, rows_to_send), rows_KE[: bounds[-1]]
    with naming_the_operation("all_to_all_single of the embedding's forward (routed reduce_scatter)", group):
        dist.all_to_all_single(recv, send, _counts(bounds), send_counts, group=group)
    return cpu.gather(rows_KE, slots_C[: math.prod(shape)].view(shape))


def _sums_of_own_rows(
    grad_output: Tensor, ids: Tensor, config: EmbeddingConfig, group_name: str
) -> tuple[Tensor, Tensor]:
    """Occurring rows, ascending, and their gradients' sums in the gradient's dtype.

    Gradients are added chunk by chunk, then the chunks' sums in order: both exchanges give the same bits.
    """
    group = find_group(group_name, None, config.world_size)
    rank, n = group.rank(), config.partition.rows_per_rank
    grad = grad_output.reshape(-1, grad_output.shape[-1])
    if config.reduction == "all_reduce":
        ids_T = ids.reshape(-1)
        return cpu.sum_rows(grad, gradient_keys(config.partition.keys(ids_T, rank), ids_T, config, n), n)
    ids_WC, wide = _by_chunk(ids, config, group), cpu.accumulation_dtype(grad.dtype)
    if ids_WC.numel() == 0:
        rows, sums = ids.reshape(-1), grad.to(wide)
    elif choose_exchange(config.exchange, grad.device.type) == "routed":
        wanted_K, slots_C = _distinct(ids_WC[rank], config)
        bounds = _owner_bounds(wanted_K, config)
        rows, send_counts = _rows_to_send(ids_WC, config, rank)
        _, sums_KE = cpu.sum_rows(grad, slots_C[: len(grad)], bounds[-1], wide)
        sums = cpu.empty((len(rows), sums_KE.shape[1]), sums_KE.dtype, sums_KE.device)
        with naming_the_operation("all_to_all_single of the embedding's backward (routed reduce_scatter)", group):
            dist.all_to_all_single(sums, sums_KE, send_counts, _counts(bounds), group=group)
    else:
        owned_rows, owned = config.partition.locate(ids_WC, rank)
        chunks = torch.arange(len(ids_WC), device=ids.device).unsqueeze(1)
        keys = torch.where(owned, chunks * n + owned_rows, len(ids_WC) * n)
        places, sums = cpu.sum_rows(_all_gather(grad, ids_WC.shape[1], group), keys.reshape(-1), len(ids_WC) * n, wide)
        rows = places % n
    if config.padding_idx is not None and config.partition.owns(config.padding_idx, rank):
        rows = rows.masked_fill(rows == config.padding_idx - config.partition.start(rank), n)
    return cpu.sum_rows(sums, rows, n, grad.dtype)


def _all_gather(grad_CE: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    grad_CE = F.pad(grad_CE, (0, 0, 0, count - len(grad_CE)))
    grad_TE = grad_CE.new_empty(count * group.size(), grad_CE.shape[1])
    if grad_TE.numel():
        with naming_the_operation("all_gather of the embedding's backward (dense)", group):
            all_gather(_as_integers(grad_TE), _as_integers(grad_CE.contiguous()), group=group)
    return grad_TE


def _distinct(ids: Tensor, config: EmbeddingConfig) -> tuple[Tensor, Tensor]:
    """Distinct ids and each id's position; invalid ids are one, the last."""
    valid = config.partition.is_valid(ids)
    return torch.where(valid, ids, config.padded_vocab_size).unique(return_inverse=True)


def _owner_bounds(wanted_K: Tensor, config: EmbeddingConfig) -> list[int]:
    """Where each owner's distinct ids begin, then invalid ones; the host waits."""
    cuts = torch.arange(config.world_size + 1, device=wanted_K.device) * config.partition.rows_per_rank
    return torch.searchsorted(wanted_K, cuts).tolist()


def _rows_to_send(ids_WC: Tensor, config: EmbeddingConfig, rank: int) -> tuple[Tensor, list[int]]:
    """The rank's distinct rows for each chunk, and counts; the host waits."""
    n, w = config.partition.rows_per_rank, config.world_size
    rows, owned = config.partition.locate(ids_WC, rank)
    chunks = torch.arange(w, device=ids_WC.device).unsqueeze(1)
    keys = (chunks * n + rows)[owned].unique()
    bounds = torch.searchsorted(keys, torch.arange(w + 1, device=keys.device) * n).tolist()
    return keys % n, _counts(bounds)


def _counts(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def _as_integers(rows: Tensor) -> Tensor:
    """View memory as integers, whose sum with zeros keeps every bit."""
    flat, width = rows.view(-1), rows.element_size()
    if width == 2:  # gloo has no int16
        return flat.view(torch.int32 if rows.shape[-1] % 2 == 0 else torch.uint8)
    return flat.view(torch.int32 if width == 4 else torch.int64)
