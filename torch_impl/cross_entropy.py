"""Cross entropy over a split vocabulary, from logits or hidden states.

Three numbers per token depend on the vocabulary: the logsumexp, the target's logit and, for label smoothing, the sum of
the logits. One operator computes these statistics over all ranks; the loss applies stock operations to them. Its
backward computes the logits' gradient from the statistics' gradients, block by block.
Shape suffixes: T tokens, C tokens of a chunk, E hidden columns, N rows of the rank's table, B columns of a block, G and
P groups and pieces of blocks, W ranks.
"""

from __future__ import annotations  # in torch 2.6 schemas of operators take types in text only

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.head import (
    ColumnBlocks,
    LossOptions,
    check_logits_width,
    check_targets_shape,
    logits_dtype_error,
    merge_adjacent,
    tree_size,
)
from shared.partition import VocabPartition
from shared.sequence import resolve_seq_dim
from torch_impl.agreement import naming_the_operation
from torch_impl.head import (
    FLOAT_DTYPES,
    backward_products,
    block_buffer,
    check_products,
    chunks,
    column_slices,
    first_order,
    gather_sequence,
    logits_block,
    owned_columns,
    reduce_hidden_grad,
)
from torch_impl.ids import checked_targets
from torch_impl.kernels.cpu import accumulation_dtype
from torch_impl.private_api import all_gather
from torch_impl.process_group import find_group, resolve_partition

__all__ = ["linear_cross_entropy", "linear_loss", "parallel_cross_entropy"]


def parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    partition: VocabPartition,
    process_group: dist.ProcessGroup | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invalid_targets: str = "error",
) -> Tensor:
    """Cross entropy of logits whose columns are split over ranks.

    Every rank of the group calls this with the same targets and options, and gets the same loss, bit for bit.

    Args:
        logits: this rank's columns, ``[*, partition.rows_per_rank]``, any floating dtype. Padding columns are ignored.
        targets: global ids, ``[*]``, any integer dtype; the same on all ranks.
        partition: ownership of the columns; its ``world_size`` is the group's.
        process_group: the ranks; None if ``partition.world_size`` is 1.
        ignore_index: targets with a loss of exactly 0 and no gradient.
        label_smoothing: share of the target spread evenly over all ``vocab_size`` ids, in [0, 1).
        z_loss: factor of the squared logsumexp, added to each token's loss.
        reduction: ``"mean"`` over the targets that are not ignored (0 without any), ``"sum"``, or ``"none"``.
        invalid_targets: result for targets outside ``[0, vocab_size)`` on every rank: ``"error"``, an IndexError, for
            which the host waits for the device; ``"ignore"``, no loss.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-d, or ``[*]`` for ``reduction="none"``.

    Forward is one all-gather of a few numbers per token; backward is local. A logit of -inf is an impossible id: as a
    target it gives inf, as does any target with label smoothing. Logits with NaN or +inf, or all -inf, give NaN. A
    token without an upstream gradient has a gradient of exactly 0. The gradient cannot be differentiated again.

    Raises:
        TypeError: logits are not floating, targets are not integers, or an option has the wrong type.
        ValueError: logits do not have one rank's width, there is not one target per token, or an option is out of range.
        IndexError: with ``invalid_targets="error"``; names the first invalid target, its position and the legal range.
        RuntimeError: a collective failed; the message names it.

    Source: Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053); label smoothing as in ``F.cross_entropy``; z-loss: ST-MoE
    (Zoph et al., 2022, arXiv:2202.08906).

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import parallel_cross_entropy
        >>> logits, targets = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]), torch.tensor([2, -100])
        >>> parallel_cross_entropy(logits, targets, VocabPartition(3, 1), None)
        tensor(0.4076)
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets)
    if not isinstance(logits, Tensor) or logits.dtype not in FLOAT_DTYPES:
        raise logits_dtype_error("logits", getattr(logits, "dtype", type(logits).__name__))
    check_logits_width(logits.shape[-1] if logits.dim() else 1, partition)
    rank, group_name = resolve_partition(partition, process_group)
    known = checked_targets(targets, options, partition.vocab_size)
    check_targets_shape(known.shape, logits.shape[:-1], "logits")
    arguments = known.reshape(-1), _sizes(partition), rank, options.label_smoothing > 0, group_name
    statistics = _LogitStatistics.apply(logits, *arguments)
    return _loss(statistics, known, options, partition)[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    partition: VocabPartition,
    process_group: dist.ProcessGroup | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    seq_dim: int | None = None,
    invalid_targets: str = "error",
    returns: Sequence[str] = (),
) -> Any:
    """Cross entropy from hidden states and a split table; stores no logits.

    Every rank of the group calls this with the same targets and options, and gets the same loss, bit for bit.

    Args:
        hidden: hidden states, ``[*, emb_size]``, the same on all ranks; with ``seq_dim`` this rank's part of the sequence.
        weight: this rank's own rows, ``[partition.rows_per_rank, emb_size]``, in the dtype of ``hidden``. Padding rows
            are ignored and get a gradient of 0.
        targets: global ids of all tokens, ``[*]``, any integer dtype; the same on all ranks.
        partition, process_group, ignore_index, label_smoothing, z_loss, reduction, invalid_targets: as in
            ``parallel_cross_entropy``.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``; None: no bound.
        seq_dim: the dimension of the targets along which ``hidden`` is split (sequence parallel); None if it is not.
            ``hidden`` is gathered once and its gradient reduce-scattered once.
        returns: further results: ``"lse"``, the logsumexp of each token's logits; ``"logprobs"``, each target's
            log-probability, 0 if ignored; ``"count"``, the number of targets that are not ignored.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or ``[*]`` for ``reduction="none"``. With ``returns`` a
        tuple of the loss and these results in the given order. ``lse`` and ``logprobs`` are ``[*]`` and differentiable,
        ``count`` is int64.

    Forward is one all-gather of a few numbers per token and keeps nothing of the vocabulary's size. Backward recomputes
    the logits block by block. It sums hidden's gradient over the ranks once, in float32; the table's gradient needs no
    communication. Loss, ``lse`` and the table's gradient do not depend on the number of ranks
    (``shared.head.ColumnBlocks`` says for which numbers). For 16-bit inputs products and sums are float32, and
    gradients are rounded once. Special values and derivatives are as in ``parallel_cross_entropy``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``parallel_cross_entropy``; also a TypeError or ValueError if
            ``hidden`` and ``weight`` differ in dtype or ``emb_size``.

    Source: cut cross entropy (Wijmans et al., 2024, arXiv:2411.09009), over a split vocabulary and in a fixed order.

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import linear_cross_entropy
        >>> hidden, table, targets = torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([1, -100])
        >>> linear_cross_entropy(hidden, table, targets, VocabPartition(2, 1), None, returns=("count",))
        (tensor(0.3133), tensor(1))
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets, softcap, seq_dim, returns)
    rank, group_name = resolve_partition(partition, process_group)
    return linear_loss(hidden, weight, targets, partition, options, rank, group_name)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    partition: VocabPartition,
    options: LossOptions,
    rank: int,
    group_name: str,
) -> Any:
    """``linear_cross_entropy`` with one options object and the group's name."""
    check_products(hidden, weight, partition)
    known = checked_targets(targets, options, partition.vocab_size)
    dim, tokens = None, list(hidden.shape[:-1])
    if options.seq_dim is not None:
        dim = resolve_seq_dim(len(tokens), options.seq_dim)
        tokens[dim] *= partition.world_size
    check_targets_shape(known.shape, tokens, "hidden (all ranks' parts together)" if dim is not None else "hidden")
    smoothed = options.label_smoothing > 0
    arguments = known.reshape(-1), _sizes(partition), rank, smoothed, options.softcap, dim, group_name
    statistics, _ = _LinearStatistics.apply(hidden, weight, *arguments)
    loss, found = _loss(statistics, known, options, partition)
    return (loss, *(found[name] for name in options.returns)) if options.returns else loss


def _sizes(partition: VocabPartition) -> list[int]:
    return [partition.vocab_size, partition.world_size, partition.padded_vocab_size]


def _loss(
    statistics: Tensor, targets: Tensor, options: LossOptions, partition: VocabPartition
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and further results from the statistics; target -1 is ignored."""
    counted = targets >= 0
    lse = statistics[0].view(targets.shape)
    # Masked before the formula, whose gradient would otherwise be 0 times NaN.
    clean = torch.where(counted, statistics.view(len(statistics), *targets.shape), 0)
    smoothing, logprobs = options.label_smoothing, clean[1] - clean[0]
    loss = clean[0] - (1 - smoothing) * clean[1] if smoothing else -logprobs
    if smoothing:
        loss = loss - clean[2] * (smoothing / partition.vocab_size)
    if options.z_loss:
        loss = loss + options.z_loss * clean[0].square()
    count = counted.sum()
    if options.reduction != "none":
        loss = loss.sum()
    if options.reduction == "mean":
        loss = loss / count.clamp(min=1)
    return loss, {"lse": lse, "logprobs": logprobs, "count": count}


def _statistics(
    block: Callable[[slice, slice], Tensor],
    targets_T: Tensor,
    partition: VocabPartition,
    rank: int,
    smoothed: bool,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
) -> Tensor:
    """Logsumexp, target's logit and, if ``smoothed``, logits' sum: ``[2 or 3, T]``.

    They cover all ranks' columns. ``block(tokens, columns)`` returns logits, which are overwritten.
    """
    start, owned = partition.start(rank), owned_columns(partition, rank)
    blocks = ColumnBlocks.of(partition)
    tree = tree_size(blocks.groups), tree_size(blocks.pieces)
    mine = targets_T.new_empty(3 + smoothed, len(targets_T), dtype=dtype)
    for tokens in chunks(len(targets_T)):
        slots_C = targets_T[tokens] - start
        maxima_GPC = mine.new_full((*tree, len(slots_C)), -torch.inf)
        exponentials_GPC, sums_GPC = torch.zeros_like(maxima_GPC), torch.zeros_like(maxima_GPC)
        target_C = mine.new_full((len(slots_C),), -torch.inf)
        for g, pieces in enumerate(blocks.ranges(owned)):
            for p, (first, stop) in enumerate(pieces):
                if first == stop:
                    continue
                x_CB = block(tokens, slice(first, stop))
                here = (slots_C >= first) & (slots_C < stop)
                taken = x_CB.gather(1, (slots_C - first).clamp(0, stop - first - 1).unsqueeze(1)).squeeze(1)
                target_C = torch.where(here, taken, target_C)
                if smoothed:
                    torch.sum(x_CB, 1, out=sums_GPC[g, p])
                torch.amax(x_CB, 1, out=maxima_GPC[g, p])
                shift = _finite_shift(maxima_GPC[g, p]).unsqueeze(1)
                torch.sum(x_CB.sub_(shift).exp_(), 1, out=exponentials_GPC[g, p])
        parts = maxima_GPC, exponentials_GPC, sums_GPC
        by_group = merge_adjacent([part.transpose(0, 1) for part in parts], _merge)
        maximum, exponentials, sums = merge_adjacent(by_group, _merge)
        for row, values in enumerate((maximum, exponentials, target_C, sums)[: len(mine)]):
            mine[row, tokens] = values
    if group is None:
        maximum, exponentials, target, *sums = mine.unbind()
    else:
        maximum, exponentials, target, *sums = _merge_ranks(mine, targets_T, partition, group)
    lse = _finite_shift(maximum) + exponentials.log()
    return torch.stack([lse, target, *sums])


def _merge_ranks(mine: Tensor, targets_T: Tensor, partition: VocabPartition, group: dist.ProcessGroup) -> list[Tensor]:
    """Gather the ranks' statistics and merge them like blocks."""
    w = partition.world_size
    everyones = mine.new_empty(tree_size(w), *mine.shape)
    with naming_the_operation("all_gather of the statistics of the cross entropy", group):
        all_gather(everyones[:w].view(-1), mine.view(-1), group=group)
    everyones[w:] = 0
    everyones[w:, 0] = -torch.inf
    owners_T = partition.owner(targets_T).clamp(min=0)
    target = everyones[:, 2].gather(0, owners_T.unsqueeze(0)).squeeze(0)
    smoothed = everyones[:, 3] if len(mine) > 3 else torch.zeros_like(everyones[:, 0])
    maximum, exponentials, sums = merge_adjacent([everyones[:, 0], everyones[:, 1], smoothed], _merge)
    return [maximum, exponentials, target, *([sums] if len(mine) > 3 else [])]


def _finite_shift(maximum: Tensor) -> Tensor:
    """Maximum to subtract before exp; 0 for -inf, which would give NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _merge(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Merge maximum, sum of exponentials and sum of logits of adjacent columns."""
    maximum = torch.maximum(left[0], right[0])
    shift = _finite_shift(maximum)
    scaled = [exponentials * (each - shift).exp() for each, exponentials, _ in (left, right)]
    return [maximum, scaled[0] + scaled[1], left[2] + right[2]]


class _Gradients:
    """Gradient of the logits from those of the statistics, block by block."""

    def __init__(self, grads: Tensor, statistics: Tensor, targets_T: Tensor, start: int) -> None:
        self.lse_T1 = statistics[0].unsqueeze(1)
        self.slots_T, self.targets_T = targets_T - start, targets_T
        self.of_lse_T1, self.of_target_T1, *self.of_sums_T1 = grads.unsqueeze(-1).unbind()
        self.silent_T = (grads == 0).all(0)

    def of_block(self, x_CB: Tensor, tokens: slice, columns: slice, softcap: float | None) -> Tensor:
        """Overwrite logits with their gradient, before ``softcap`` if given."""
        slope_CB = None if softcap is None else 1 - (x_CB / softcap).square_()
        grad_CB = x_CB.sub_(self.lse_T1[tokens]).exp_().mul_(self.of_lse_T1[tokens])
        for of_sums_T1 in self.of_sums_T1:
            grad_CB.add_(of_sums_T1[tokens])
        slots_C1 = self.slots_T[tokens].unsqueeze(1)
        here = (slots_C1 >= columns.start) & (slots_C1 < columns.stop)
        places = (slots_C1 - columns.start).clamp(0, columns.stop - columns.start - 1)
        grad_CB.scatter_add_(1, places, torch.where(here, self.of_target_T1[tokens], 0))
        return grad_CB if slope_CB is None else grad_CB.mul_(slope_CB)


class _LogitStatistics(torch.autograd.Function):
    """Statistics over all ranks from a rank's logits."""

    @staticmethod
    def forward(
        logits: Tensor, targets_T: Tensor, sizes: Sequence[int], rank: int, smoothed: bool, group_name: str
    ) -> Tensor:
        return torch.ops.pve.logit_statistics(logits, targets_T, sizes, rank, smoothed, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, targets_T, ctx.sizes, ctx.rank, *_ = inputs
        ctx.save_for_backward(logits, targets_T, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets_T, statistics = ctx.saved_tensors
        arguments = grads[0], statistics, logits, targets_T, ctx.sizes, ctx.rank
        grad = first_order(torch.ops.pve.logit_statistics_backward, *arguments)
        return grad, *[None] * 5


class _LinearStatistics(torch.autograd.Function):
    """Statistics over all ranks from hidden states and a rank's rows."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets_T: Tensor,
        sizes: Sequence[int],
        rank: int,
        smoothed: bool,
        softcap: float | None,
        seq_dim: int | None,
        group_name: str,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.pve.linear_statistics(
            hidden, weight, targets_T, sizes, rank, smoothed, softcap, seq_dim, group_name
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, targets_T, sizes, rank, _smoothed, *others = inputs
        ctx.options = list(hidden.shape), sizes, rank, *others
        ctx.save_for_backward(output[1] if output[1].numel() else hidden, weight, targets_T, output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets_T, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        arguments = grads[0], statistics, hidden, weight, targets_T, *ctx.options, wanted[0], wanted[1]
        hidden_grad, weight_grad = first_order(torch.ops.pve.linear_statistics_backward, *arguments)
        return (hidden_grad if wanted[0] else None, weight_grad if wanted[1] else None, *[None] * 7)


@torch.library.custom_op("pve::logit_statistics", mutates_args=())
def _logit_statistics(
    logits: Tensor, targets_T: Tensor, sizes: Sequence[int], rank: int, smoothed: bool, group_name: str
) -> Tensor:
    partition, wide = VocabPartition(*sizes), accumulation_dtype(logits.dtype)
    logits_TN = logits.reshape(len(targets_T), logits.shape[-1])
    buffer = block_buffer(len(targets_T), partition, wide, logits.device)

    def block(tokens: slice, columns: slice) -> Tensor:
        given = logits_TN[tokens, columns]
        return buffer[: given.numel()].view(given.shape).copy_(given)

    group = find_group(group_name, rank, partition.world_size) if group_name else None
    return _statistics(block, targets_T, partition, rank, smoothed, group, wide)


@_logit_statistics.register_fake
def _(logits: Tensor, targets_T: Tensor, sizes: Sequence[int], rank: int, smoothed: bool, group_name: str) -> Tensor:
    return logits.new_empty(2 + smoothed, targets_T.shape[0], dtype=accumulation_dtype(logits.dtype))


@torch.library.custom_op("pve::logit_statistics_backward", mutates_args=())
def _logit_statistics_backward(
    grads: Tensor, statistics: Tensor, logits: Tensor, targets_T: Tensor, sizes: Sequence[int], rank: int
) -> Tensor:
    partition = VocabPartition(*sizes)
    logits_TN = logits.reshape(len(targets_T), logits.shape[-1])
    gradients = _Gradients(grads, statistics, targets_T, partition.start(rank))
    grad_TN = torch.empty_like(logits_TN, memory_format=torch.contiguous_format)
    grad_TN[:, owned_columns(partition, rank) :] = 0
    buffer = block_buffer(len(targets_T), partition, grads.dtype, logits.device)
    for columns in column_slices(partition, rank):
        for tokens in chunks(len(targets_T)):
            given = logits_TN[tokens, columns]
            x_CB = buffer[: given.numel()].view(given.shape).copy_(given)
            grad_TN[tokens, columns] = gradients.of_block(x_CB, tokens, columns, None)
    if gradients.silent_T.any():
        grad_TN.masked_fill_(gradients.silent_T.unsqueeze(1), 0)
    return grad_TN.view(logits.shape)


@_logit_statistics_backward.register_fake
def _(grads: Tensor, statistics: Tensor, logits: Tensor, targets_T: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("pve::linear_statistics", mutates_args=())
def _linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets_T: Tensor,
    sizes: Sequence[int],
    rank: int,
    smoothed: bool,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    partition, wide = VocabPartition(*sizes), accumulation_dtype(weight.dtype)
    group = find_group(group_name, rank, partition.world_size) if group_name else None
    gathered = gather_sequence(hidden, seq_dim, group)
    whole = gathered if seq_dim is not None and group is not None else hidden
    hidden_TE = whole.reshape(len(targets_T), hidden.shape[-1])
    buffer = block_buffer(len(targets_T), partition, wide, hidden.device)

    def block(tokens: slice, columns: slice) -> Tensor:
        return logits_block(hidden_TE[tokens].to(wide), weight[columns].to(wide), softcap, buffer)

    return _statistics(block, targets_T, partition, rank, smoothed, group, wide), gathered


@_linear_statistics.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets_T: Tensor,
    sizes: Sequence[int],
    rank: int,
    smoothed: bool,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    statistics = hidden.new_empty(2 + smoothed, targets_T.shape[0], dtype=accumulation_dtype(weight.dtype))
    shape = list(hidden.shape)
    if seq_dim is None or not group_name:
        shape = [0]
    else:
        shape[seq_dim] *= sizes[1]
    return statistics, hidden.new_empty(shape)


@torch.library.custom_op("pve::linear_statistics_backward", mutates_args=())
def _linear_statistics_backward(
    grads: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets_T: Tensor,
    shape: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    partition = VocabPartition(*sizes)
    group = find_group(group_name, rank, partition.world_size) if group_name else None
    hidden_TE = hidden.reshape(len(targets_T), hidden.shape[-1])
    gradients = _Gradients(grads, statistics, targets_T, partition.start(rank))
    buffer = block_buffer(len(targets_T), partition, grads.dtype, grads.device)

    def gradient(hidden_CE: Tensor, rows_BE: Tensor, tokens: slice, columns: slice) -> Tensor:
        return gradients.of_block(logits_block(hidden_CE, rows_BE, softcap, buffer), tokens, columns, softcap)

    wanted, silent_T = (wants_hidden, wants_weight), gradients.silent_T
    hidden_grad, weight_grad = backward_products(hidden_TE, weight, partition, rank, wanted, silent_T, gradient)
    if wants_hidden:
        hidden_grad = reduce_hidden_grad(hidden_grad, shape, hidden.dtype, seq_dim, group)
    return hidden_grad, weight_grad


@_linear_statistics_backward.register_fake
def _(
    grads: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets_T: Tensor,
    shape: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(shape if wants_hidden else [0]), weight.new_empty(weight.shape if wants_weight else [0])
