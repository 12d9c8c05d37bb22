"""Decoding over a split vocabulary, without gathering logits.

Shape suffixes: T tokens, N columns of the rank, K candidates, B columns of a block, W ranks.
"""

import math

import jax
import jax.numpy as jnp

from jax_impl.cross_entropy import as_leaves, finite_shift, maximum_and_sum, merge_levels, rank_levels
from jax_impl.functional import check_axis, check_same_on_ranks
from jax_impl.head import Block, Plan, block_edges, block_of, owned_columns, vary, wide_dtype
from jax_impl.private_api import all_gather_invarying
from shared.head import (
    ColumnBlocks,
    check_logits_width,
    check_targets_shape,
    check_top_k,
    logits_dtype_error,
    tree_size,
)
from shared.partition import VocabPartition

__all__ = ["parallel_argmax", "parallel_sample", "parallel_top_k"]


def parallel_argmax(logits: jax.Array, partition: VocabPartition, axis_name: str = "tp") -> jax.Array:
    """Find the id of each token's greatest logit.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        logits: the rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64. Padding columns
            are ignored.
        partition: ownership of the columns; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.

    Returns:
        Global ids, int32 ``[*]``, not varying over ``axis_name``. Of equal logits the lowest id wins; -0.0 equals 0.0. NaN
        is greater than any number.

    Raises:
        TypeError, ValueError: as ``parallel_top_k`` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import parallel_argmax
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> def greedy(logits):
        ...     return parallel_argmax(logits, VocabPartition(3, 1), "tp")
        >>> greedy = jax.jit(jax.shard_map(greedy, mesh=mesh, in_specs=P(None, "tp"), out_specs=P()))
        >>> greedy(jnp.array([[1.0, 5.0, 5.0], [0.0, -1.0, 0.0]]))
        Array([1, 0], dtype=int32)
    """
    return parallel_top_k(logits, 1, partition, axis_name)[1][..., 0]


def parallel_top_k(
    logits: jax.Array, k: int, partition: VocabPartition, axis_name: str = "tp"
) -> tuple[jax.Array, jax.Array]:
    """Find each token's ``k`` greatest logits, in descending order, and their ids.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        logits: the rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64. Padding columns
            are ignored.
        k: number of logits, at most ``partition.vocab_size``.
        partition: ownership of the columns; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.

    Returns:
        ``(values, ids)``, both ``[*, k]``, not varying over ``axis_name``: values in the dtype of ``logits``, -0.0 as 0.0
        and every NaN the same; global ids, int32. Of equal logits the lower id comes first. NaN precedes all numbers.

    Each rank contributes ``min(k, rows_per_rank)`` candidates per token, gathered as logits and ids. There is no gradient.

    Raises:
        TypeError: logits are not floating, or ``k`` is not an integer.
        ValueError: logits do not have one rank's width, ``k`` is out of range, or the axis does not have
            ``partition.world_size`` ranks.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import parallel_top_k
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> def best(logits):
        ...     return parallel_top_k(logits, 3, VocabPartition(4, 1), "tp")
        >>> best = jax.jit(jax.shard_map(best, mesh=mesh, in_specs=P("tp"), out_specs=P()))
        >>> best(jnp.array([1.0, 5.0, 5.0, 2.0]))
        (Array([5., 5., 2.], dtype=float32), Array([1, 2, 3], dtype=int32))
    """
    _check_logits(logits, partition, axis_name)
    k, n, plan = check_top_k(k, partition.vocab_size), partition.rows_per_rank, Plan(partition, axis_name)
    logits_TN = jax.lax.stop_gradient(logits).reshape(math.prod(logits.shape[:-1]), n)
    # top_k orders by sign bit, where -0.0 is below 0.0 and a negative NaN below all.
    logits_TN = jnp.where(logits_TN == 0, 0, jnp.where(jnp.isnan(logits_TN), jnp.nan, logits_TN))
    logits_TN = jnp.where(jnp.arange(n) < owned_columns(plan), logits_TN, -jnp.inf)
    values_TK, columns_TK = jax.lax.top_k(logits_TN, min(k, n))
    ids_TK = columns_TK.astype(jnp.int32) + partition.start(jax.lax.axis_index(axis_name))
    # Candidates in rank order: of equal logits top_k prefers the first, which has the lowest id. Padding comes last.
    gathered = [all_gather_invarying(each, axis_name, axis=1) for each in (values_TK, ids_TK)]
    values_TK, places_TK = jax.lax.top_k(gathered[0], k)
    tokens_T1 = jnp.arange(len(places_TK))[:, None]
    ids_TK = gathered[1].at[tokens_T1, places_TK].get(mode="promise_in_bounds")
    shape = *logits.shape[:-1], k
    return values_TK.reshape(shape), ids_TK.reshape(shape)


def parallel_sample(
    logits: jax.Array, partition: VocabPartition, axis_name: str = "tp", *, uniform: jax.Array
) -> jax.Array:
    """Draw one id per token, with probabilities ``softmax(logits)``.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        logits: the rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64, already divided
            by the temperature. Padding columns are ignored.
        partition: ownership of the columns; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        uniform: one random number in [0, 1) per token, ``[*]``, the same on all ranks.

    Returns:
        Global ids, int32 ``[*]``, not varying over ``axis_name``: the smallest id whose cumulative probability exceeds
        ``uniform``. It is -1 where logits hold NaN or +inf or are all -inf, or ``uniform`` is outside [0, 1).

    Probabilities are summed in float32 (float64 for float64 logits), in the order of a fixed tree: ids do not depend on the
    number of ranks. A rank sends two numbers, then one id per token. There is no gradient.

    Raises:
        TypeError: ``logits`` or ``uniform`` are not floating.
        ValueError: a shape does not fit, ``uniform`` varies over the axis, or the axis does not have
            ``partition.world_size`` ranks.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import parallel_sample
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> def draw(logits, uniform):
        ...     return parallel_sample(logits, VocabPartition(3, 1), "tp", uniform=uniform)
        >>> draw = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=(P(None, "tp"), P()), out_specs=P()))
        >>> draw(jnp.log(jnp.array([[0.25, 0.25, 0.5]] * 2)), jnp.array([0.2, 0.9]))
        Array([0, 2], dtype=int32)
    """
    _check_logits(logits, partition, axis_name)
    if not jnp.issubdtype(uniform.dtype, jnp.floating):
        raise logits_dtype_error("uniform", uniform.dtype)
    check_same_on_ranks("uniform", uniform, axis_name)
    check_targets_shape(uniform.shape, logits.shape[:-1], "logits", "uniform")
    plan, wide = Plan(partition, axis_name), wide_dtype(logits.dtype)
    logits_TN = jax.lax.stop_gradient(logits).reshape(uniform.size, partition.rows_per_rank).astype(wide)
    uniform_T = jax.lax.stop_gradient(uniform).reshape(-1).astype(wide)
    edges = jnp.asarray(block_edges(partition))

    def columns_of(here: Block) -> jax.Array:
        x_TB = jax.lax.dynamic_slice_in_dim(logits_TN, here.at, len(here.columns_B), axis=1)
        return jnp.where(here.owned_B, x_TB, -jnp.inf)

    found = jax.lax.map(lambda edges: jnp.stack(maximum_and_sum(columns_of(block_of(edges, plan)))), edges)
    levels = merge_levels(as_leaves(found.swapaxes(0, 1), ColumnBlocks.of(partition)))
    over_ranks = rank_levels(jnp.stack(levels[-1])[:, 0], plan)
    maximum_T, total_T = (each[0] for each in over_ranks[-1])
    shift_T = finite_shift(maximum_T)
    owner_T, threshold_T = _descend(over_ranks, shift_T, uniform_T * total_T)
    leaf_T, threshold_T = _descend(levels, shift_T, threshold_T)
    blocks = ColumnBlocks.of(partition)
    group_T, piece_T = jnp.divmod(leaf_T, tree_size(blocks.pieces))

    def pick(x_TB: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, edges = block
        chosen_T1 = (number == group_T * blocks.pieces + piece_T)[:, None]
        return jnp.where(chosen_T1, columns_of(block_of(edges, plan)), x_TB), None

    nothing = jnp.full((len(logits_TN), blocks.columns), -jnp.inf, wide)
    x_TB, _ = jax.lax.scan(pick, vary(nothing, found, uniform_T, axis_name), (jnp.arange(len(edges)), edges))
    cumulative_TB = jnp.cumsum(jnp.exp(x_TB - shift_T[:, None]), axis=1)
    # The last sum counts as above any threshold: rounding may leave it below.
    above_TB = (cumulative_TB > threshold_T[:, None]) | (cumulative_TB == cumulative_TB[:, -1:])
    last_T = edges[:, 1][group_T * blocks.pieces + piece_T]
    rank = jax.lax.axis_index(axis_name)
    ids_T = partition.start(rank) + last_T - blocks.columns + jnp.argmax(above_TB, axis=1)
    legal_T = (uniform_T >= 0) & (uniform_T < 1) & (total_T > 0) & jnp.isfinite(total_T)
    mine_T = jnp.where((owner_T == rank) & legal_T, ids_T.astype(jnp.int32), -1)
    return all_gather_invarying(mine_T, axis_name, tiled=False).max(axis=0).reshape(uniform.shape)


def _descend(levels: list[list[jax.Array]], shift_T: jax.Array, threshold_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Leaf in which the cumulative sum passes the threshold, and the remainder."""
    leaf_T = jnp.zeros_like(threshold_T, jnp.int32)
    for maxima, sums in levels[-2::-1]:
        masses = sums * jnp.exp(maxima - shift_T)
        numbers = jnp.arange(len(masses), dtype=jnp.int32)[:, None]
        left_T, right_T = (jnp.where(numbers == 2 * leaf_T + side, masses, 0).sum(axis=0) for side in (0, 1))
        goes_right_T = (left_T <= threshold_T) & (right_T > 0)
        leaf_T = 2 * leaf_T + goes_right_T.astype(jnp.int32)
        threshold_T = jnp.where(goes_right_T, threshold_T - left_T, threshold_T)
    return leaf_T, threshold_T


def _check_logits(logits: jax.Array, partition: VocabPartition, axis_name: str) -> None:
    check_axis(partition, axis_name)
    if logits.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise logits_dtype_error("logits", logits.dtype)
    check_logits_width(logits.shape[-1] if logits.ndim else 1, partition)
