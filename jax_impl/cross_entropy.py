"""Cross entropy over a split vocabulary, from logits or hidden states.

Three *statistics* of a token depend on the vocabulary: the logsumexp, the target's logit and, for label smoothing, the sum
of the logits. The loss is plain JAX on them. The logits' gradient follows from the statistics' gradients, block by block.
Shape suffixes: S statistics, T tokens, K chunks of C tokens, E hidden columns, N rows of the rank's table, B columns of a
block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_impl.functional import check_axis, check_same_on_ranks
from jax_impl.head import (
    Block,
    Plan,
    backward_products,
    block_edges,
    block_of,
    check_products,
    gather_sequence,
    logits_block,
    owned_columns,
    part_of,
    rows_of,
    split_tokens,
    vary,
    wide_dtype,
)
from jax_impl.ids import INVALID, as_targets, check_targets
from jax_impl.private_api import all_gather_invarying
from shared.head import (
    ColumnBlocks,
    LossOptions,
    check_logits_width,
    check_targets_shape,
    logits_dtype_error,
    tree_size,
)
from shared.partition import VocabPartition
from shared.sequence import resolve_seq_dim

__all__ = [
    "as_leaves",
    "finite_shift",
    "linear_cross_entropy",
    "linear_statistics",
    "loss_of",
    "maximum_and_sum",
    "merge_levels",
    "parallel_cross_entropy",
    "rank_levels",
]


def parallel_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invalid_targets: str = "error",
) -> jax.Array:
    """Cross entropy of logits whose columns are split over ranks.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        logits: the rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64. Padding columns
            are ignored.
        targets: global ids, ``[*]``, any integer dtype, the same on all ranks.
        partition: ownership of the columns; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        ignore_index: targets with a loss of exactly 0 and no gradient.
        label_smoothing: share of the target spread evenly over all ``vocab_size`` ids, in [0, 1).
        z_loss: factor of the squared logsumexp, added to each token's loss.
        reduction: ``"mean"`` over the targets that are not ignored (0 without any), ``"sum"``, or ``"none"``; over the
            tokens given, not over data axes.
        invalid_targets: result for targets outside ``[0, vocab_size)``: ``"error"``, a loss of NaN without a gradient, and
            an error under ``jax.experimental.checkify``; ``"ignore"``, no loss.

    Returns:
        The loss, float32 (float64 for float64 logits), not varying over ``axis_name``: 0-d, or ``[*]`` for
        ``reduction="none"``.

    Forward is one all-gather of a few numbers per token; backward is local. A logit of -inf is an impossible id: as a target
    it gives inf, as does any target with label smoothing. Logits with NaN or +inf, or all -inf, give NaN. A token without an
    upstream gradient has a gradient of exactly 0. Reverse mode only.

    Raises:
        TypeError: logits are not floating, targets are not integers, or an option has the wrong type.
        ValueError: logits do not have one rank's width, there is not one target per token, targets vary over the axis, or an
            option is out of range.

    Source: Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053); label smoothing as in PyTorch's ``F.cross_entropy``;
    z-loss: ST-MoE (Zoph et al., 2022, arXiv:2202.08906).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import parallel_cross_entropy
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> partition = VocabPartition(vocab_size=3, world_size=1)
        >>> def loss(logits, targets):
        ...     return parallel_cross_entropy(logits, targets, partition, "tp")
        >>> loss = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "tp"), P()), out_specs=P()))
        >>> loss(jnp.array([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]), jnp.array([2, -100])).round(4)
        Array(0.4076, dtype=float32)
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets)
    check_axis(partition, axis_name)
    if logits.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise logits_dtype_error("logits", logits.dtype)
    check_logits_width(logits.shape[-1] if logits.ndim else 1, partition)
    known = _known_targets(targets, options, partition, axis_name)
    check_targets_shape(known.shape, logits.shape[:-1], "logits")
    statistics = _logit_statistics(logits, known, Plan(partition, axis_name), options.label_smoothing > 0)
    return loss_of(statistics, known, options, partition)


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
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
    """Cross entropy of ``hidden @ table.T`` over a split table, without logits.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        hidden: hidden states, ``[*, emb_size]``, the same on all ranks; with ``seq_dim`` this rank's part of the sequence.
        weight: the rank's rows, ``[partition.rows_per_rank, emb_size]``, in the dtype of ``hidden``. Padding rows are
            ignored and get a gradient of 0.
        targets: global ids of all tokens, ``[*]``, any integer dtype, the same on all ranks.
        partition: ownership of the rows; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        ignore_index, label_smoothing, z_loss, reduction, invalid_targets: as in ``parallel_cross_entropy``.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``. None: no bound.
        seq_dim: the dimension of the targets along which ``hidden`` is split over ranks (sequence parallelism); ``hidden``
            is gathered once, its gradient reduce-scattered once. None: not split.
        returns: further results: ``"lse"``, each token's logsumexp; ``"logprobs"``, each target's log-probability, 0 for
            ignored ones; ``"count"``, the number of targets that are not ignored.

    Returns:
        The loss, float32 (float64 for float64 inputs), not varying over ``axis_name``: 0-d, or ``[*]`` for
        ``reduction="none"``. With ``returns``, a tuple of the loss and those results in that order; ``lse`` and
        ``logprobs`` are ``[*]`` and differentiable, ``count`` is int32.

    Forward is one all-gather of a few numbers per token, and keeps nothing of the vocabulary's size. Backward recomputes the
    logits block by block. It sums the gradient of ``hidden`` over the ranks once, in float32; the table's gradient is local.
    Products and sums are float32 for 16-bit inputs. Gradients are rounded once, after the sum over data axes. Loss, ``lse``
    and the table's gradient do not depend on the number of ranks, within the limits of ``shared.head.ColumnBlocks``. On
    accelerators products have the precision of ``jax.default_matmul_precision``. Special values are those of
    ``parallel_cross_entropy``. Reverse mode only.

    Raises:
        TypeError: a dtype is not legal, or an option has the wrong type.
        ValueError: a shape does not fit, hidden states or targets vary over the axis, or an option is out of range.

    Source: cut cross entropy (Wijmans et al., 2024, arXiv:2411.09009), over a split vocabulary and in a fixed order.

    Example:
        >>> import functools
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import linear_cross_entropy
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> loss = functools.partial(linear_cross_entropy, partition=VocabPartition(2, 1), returns=("count",))
        >>> loss = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("tp", None), P()), out_specs=P()))
        >>> mean, count = loss(jnp.eye(2), jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([1, -100]))
        >>> round(float(mean), 4), int(count)
        (0.3133, 1)
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets, softcap, seq_dim, returns)
    known = _known_targets(targets, options, partition, axis_name)
    statistics = linear_statistics(hidden, weight, known, partition, axis_name, options)
    return loss_of(statistics, known, options, partition)


def _known_targets(targets: ArrayLike, options: LossOptions, partition: VocabPartition, axis_name: str) -> jax.Array:
    known = jnp.asarray(as_targets(targets, partition.vocab_size, options.ignore_index))
    check_same_on_ranks("targets", known, axis_name)
    if options.invalid_targets == "error":
        check_targets(targets, partition.vocab_size, options.ignore_index)
    return known


def loss_of(
    statistics: jax.Array,
    targets: jax.Array,
    options: LossOptions,
    partition: VocabPartition,
    data_axes: tuple[str, ...] = (),
) -> Any:
    """Loss, and further results asked for, from the statistics.

    Statistics are ``[2 or 3, *]``, targets ``[*]`` as ``as_targets`` returns them. Mean, sum and count include the tokens
    of ``data_axes``.
    """
    counted = targets >= 0
    # Select first: in the gradient of the formula, 0 times NaN would be NaN.
    clean = jnp.where(counted, statistics, 0)
    smoothing, logprobs = options.label_smoothing, clean[1] - clean[0]
    loss = clean[0] - (1 - smoothing) * clean[1] if smoothing else -logprobs
    if smoothing:
        loss -= clean[2] * (smoothing / partition.vocab_size)
    if options.z_loss:
        loss += options.z_loss * jnp.square(clean[0])
    if options.invalid_targets == "error":
        loss = jnp.where(targets == INVALID, jnp.nan, loss)
    count = counted.sum(dtype=jnp.int32)
    if data_axes:
        count = jax.lax.psum(count, data_axes)
    if options.reduction != "none":
        loss = jax.lax.psum(loss.sum(), data_axes) if data_axes else loss.sum()
    if options.reduction == "mean":
        loss /= jnp.maximum(count, 1).astype(loss.dtype)
    found = {"lse": statistics[0], "logprobs": logprobs, "count": count}
    return (loss, *[found[name] for name in options.returns]) if options.returns else loss


def linear_statistics(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    partition: VocabPartition,
    axis_name: str,
    options: LossOptions,
) -> jax.Array:
    """Statistics of ``hidden @ table.T``: ``[2 or 3, *targets.shape]``."""
    tokens, dim = list(hidden.shape[:-1]), None
    if options.seq_dim is not None:
        dim = resolve_seq_dim(len(tokens), options.seq_dim)
        tokens[dim] *= partition.world_size
        hidden = vary(hidden, axis_name)
    plan = Plan(partition, axis_name, options.softcap, dim)
    check_products(hidden, weight, plan)
    check_targets_shape(targets.shape, tokens, "hidden" if dim is None else "hidden (all ranks' parts together)")
    return _linear_statistics(hidden, weight, targets, plan, options.label_smoothing > 0)


def _local_statistics(
    block: Callable[[Block, jax.Array], jax.Array], rows_KC: jax.Array, plan: Plan, smoothed: bool
) -> jax.Array:
    """Statistics of the rank's columns, ``[3 or 4, K, C]``.

    They are the maximum, the sum of exponentials, the target's logit and, if ``smoothed``, the sum of logits.
    ``block(block, chunk)`` returns logits. ``rows_KC`` are the targets' rows, ``rows_per_rank`` for foreign ones.
    """

    def of_chunk(chunk: jax.Array) -> jax.Array:
        def of_block(edges: jax.Array) -> jax.Array:
            here = block_of(edges, plan)
            x_CB = block(here, chunk)
            hit_CB = here.owned_B & (here.columns_B == rows_KC[chunk][:, None])
            found = [*maximum_and_sum(x_CB), jnp.where(hit_CB, x_CB, 0).sum(axis=1)]
            if smoothed:
                found.append(jnp.where(here.owned_B, x_CB, 0).sum(axis=1))
            return jnp.stack(found)

        found = jax.lax.map(of_block, jnp.asarray(block_edges(plan.partition)))  # [groups * pieces, S, C]
        return jnp.stack(merge_levels(as_leaves(found.swapaxes(0, 1), ColumnBlocks.of(plan.partition)))[-1])[:, 0]

    return jnp.moveaxis(jax.lax.map(of_chunk, jnp.arange(len(rows_KC))), 0, 1)


def maximum_and_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maximum of the last dimension, and sum of exponentials relative to it."""
    maximum = x.max(axis=-1)
    return maximum, jnp.exp(x - finite_shift(maximum)[..., None]).sum(axis=-1)


def finite_shift(maximum: jax.Array) -> jax.Array:
    """Shift before exp: the maximum, or 0 where it is -inf."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)  # -inf - -inf would be NaN


def as_leaves(statistics: jax.Array, blocks: ColumnBlocks) -> list[jax.Array]:
    """Leaves of the tree from statistics ``[S, groups * pieces, *]``, padded."""
    rest = statistics.shape[2:]
    by_group = statistics.reshape(len(statistics), blocks.groups, blocks.pieces, *rest)
    widths = [(0, 0), (0, tree_size(blocks.pieces) - blocks.pieces), *[(0, 0)] * len(rest)]
    nothing = [-jnp.inf, *[0.0] * (len(by_group) - 1)]
    leaves = [jnp.pad(each, widths, constant_values=value) for each, value in zip(by_group, nothing, strict=True)]
    return [each.reshape(each.shape[0] * each.shape[1], *rest) for each in leaves]


def merge_levels(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Levels of the tree over leaves ``[count, *]``, root last."""
    levels = [leaves]
    while levels[-1][0].shape[0] > 1:
        levels.append(_merge([each[0::2] for each in levels[-1]], [each[1::2] for each in levels[-1]]))
    return levels


def _merge(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
    maximum = jnp.maximum(left[0], right[0])
    shift = finite_shift(maximum)
    exponentials = left[1] * jnp.exp(left[0] - shift) + right[1] * jnp.exp(right[0] - shift)
    return [maximum, exponentials, *[a + b for a, b in zip(left[2:], right[2:], strict=True)]]


def rank_levels(local_ST: jax.Array, plan: Plan) -> list[list[jax.Array]]:
    """Levels of the tree over ranks, from each rank's statistics."""
    gathered = all_gather_invarying(local_ST, plan.axis_name, axis=1, tiled=False)
    return merge_levels(as_leaves(gathered, ColumnBlocks(1, plan.partition.world_size, 0, 0)))


def _over_ranks(local_SKC: jax.Array, targets: jax.Array, plan: Plan) -> jax.Array:
    """Merge the ranks' statistics into ``[2 or 3, *targets.shape]`` of all columns."""
    local_ST = local_SKC.reshape(len(local_SKC), local_SKC.shape[1] * local_SKC.shape[2])[:, : targets.size]
    root = rank_levels(local_ST, plan)[-1]
    maximum, exponentials, *others = [each[0] for each in root]
    lse = finite_shift(maximum) + jnp.log(exponentials)
    return jnp.stack([lse, *others]).reshape(1 + len(others), *targets.shape)


def _logits_gradient(
    x_CB: jax.Array, statistics_SC: jax.Array, grads_SC: jax.Array, columns: jax.Array, rows_C: jax.Array
) -> jax.Array:
    """Gradient of the logits, from the gradients of their statistics."""
    lse_C1, (on_lse_C1, on_target_C1, *on_every) = statistics_SC[0][..., None], grads_SC[..., None]
    grad_CB = jnp.exp(x_CB - lse_C1) * on_lse_C1 + jnp.where(columns == rows_C[..., None], on_target_C1, 0)
    return grad_CB + on_every[0] if on_every else grad_CB


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_statistics(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, plan: Plan, smoothed: bool
) -> jax.Array:
    return _linear_forward(hidden, weight, targets, plan, smoothed)[0]


def _linear_forward(
    hidden: jax.Array, weight: jax.Array, targets: jax.Array, plan: Plan, smoothed: bool
) -> tuple[jax.Array, Any]:
    whole = gather_sequence(hidden, plan)
    chunks_KCE, rows_KC = split_tokens(whole, whole.ndim - 1), split_tokens(_rows(targets, plan), targets.ndim)

    def block(here: Block, chunk: jax.Array) -> jax.Array:
        return logits_block(part_of(chunks_KCE, chunk, 1)[0], rows_of(weight, here), here, plan.softcap)

    statistics = _over_ranks(_local_statistics(block, rows_KC, plan, smoothed), targets, plan)
    return statistics, (hidden, whole, weight, targets, statistics)


def _linear_backward(plan: Plan, smoothed: bool, residuals: Any, grads: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    hidden, whole, weight, targets, statistics = residuals
    rows_KC = split_tokens(_rows(targets, plan), targets.ndim)
    grads_KCS, statistics_KCS = (split_tokens(jnp.moveaxis(each, 0, -1), targets.ndim) for each in (grads, statistics))

    def gradient(hidden_CE: jax.Array, rows_BE: jax.Array, here: Block, chunk: jax.Array) -> jax.Array:
        x_CB = logits_block(hidden_CE, rows_BE, here, plan.softcap)
        by_statistic = statistics_KCS[chunk].T, grads_KCS[chunk].T
        grad_CB = _logits_gradient(x_CB, *by_statistic, here.columns_B, rows_KC[chunk])
        return grad_CB if plan.softcap is None else grad_CB * (1 - jnp.square(x_CB / plan.softcap))

    silent_KC = (grads_KCS == 0).all(axis=-1)
    return *backward_products(hidden, whole, weight, plan, silent_KC, gradient), None


_linear_statistics.defvjp(_linear_forward, _linear_backward)


def _rows(targets: jax.Array, plan: Plan) -> jax.Array:
    """Rows of the targets; ``rows_per_rank`` for foreign and ignored ones."""
    return plan.partition.keys(targets, jax.lax.axis_index(plan.axis_name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _logit_statistics(logits: jax.Array, targets: jax.Array, plan: Plan, smoothed: bool) -> jax.Array:
    return _logit_forward(logits, targets, plan, smoothed)[0]


def _logit_forward(logits: jax.Array, targets: jax.Array, plan: Plan, smoothed: bool) -> tuple[jax.Array, Any]:
    logits_TN = logits.reshape(targets.size, logits.shape[-1])

    def block(here: Block, _chunk: jax.Array) -> jax.Array:
        x_TB = jax.lax.dynamic_slice_in_dim(logits_TN, here.at, len(here.columns_B), axis=1)
        return jnp.where(here.owned_B, x_TB.astype(wide_dtype(logits.dtype)), -jnp.inf)

    rows_KC = _rows(targets, plan).reshape(1, -1)  # one chunk: there are no products to bound
    statistics = _over_ranks(_local_statistics(block, rows_KC, plan, smoothed), targets, plan)
    return statistics, (logits, targets, statistics)


def _logit_backward(plan: Plan, smoothed: bool, residuals: Any, grads: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, statistics = residuals
    columns = jnp.arange(logits.shape[-1])
    x = logits.astype(wide_dtype(logits.dtype))
    grad = _logits_gradient(x, statistics, grads, columns, _rows(targets, plan))
    counted = (columns < owned_columns(plan)) & (grads != 0).any(axis=0)[..., None]
    return jnp.where(counted, grad, 0).astype(logits.dtype), None


_logit_statistics.defvjp(_logit_forward, _logit_backward)
