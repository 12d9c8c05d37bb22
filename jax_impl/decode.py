"""Decoding over a split vocabulary: a few candidates a token travel, never the logits.

Shape suffixes: T tokens, N columns of the rank, K candidates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_impl.functional import check_axis
from jax_impl.head import Plan, owned_columns
from shared.head import check_logits_width, check_top_k, logits_dtype_error
from shared.partition import VocabPartition

__all__ = ["parallel_argmax", "parallel_top_k"]


def parallel_argmax(logits: jax.Array, partition: VocabPartition, axis_name: str = "tp") -> jax.Array:
    """Find the id of each token's greatest logit.

    To be called inside a ``jax.shard_map`` that is manual over ``axis_name``; the rank is the position along that axis.

    Args:
        logits: the rank's own columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64. Columns of
            padding take no part.
        partition: who owns what; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis over which the vocabulary is split.

    Returns:
        Global ids, int32 ``[*]``, not varying over ``axis_name``. Of equal logits the lowest id wins (-0.0 equals 0.0); NaN
        is greater than any number.

    Raises:
        TypeError, ValueError: as ``parallel_top_k``.

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
    """Find each token's k greatest logits, in descending order, and their ids.

    To be called inside a ``jax.shard_map`` that is manual over ``axis_name``; the rank is the position along that axis.

    Args:
        logits: the rank's own columns, ``[*, partition.rows_per_rank]``, float16, bfloat16, float32 or float64. Columns of
            padding take no part.
        k: how many, at most ``partition.vocab_size``.
        partition: who owns what; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis over which the vocabulary is split.

    Returns:
        ``(values, ids)``, both ``[*, k]``, not varying over ``axis_name``: values in the dtype of ``logits``, with -0.0 as
        0.0 and one kind of NaN; global ids, int32. Of equal logits the lower id comes first; NaN comes before all numbers.

    Each rank contributes ``min(k, rows_per_rank)`` candidates a token, gathered as logits and integers. There is no
    gradient.

    Raises:
        TypeError: logits are not floating, or k is not an integer.
        ValueError: logits are not as wide as one rank's part, k is out of range, or the axis has another size than
            ``partition.world_size``.

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
    logits_TN = jax.lax.stop_gradient(logits).reshape(-1, n)
    # top_k orders by sign bit, where -0.0 is below 0.0 and a negative NaN below all.
    logits_TN = jnp.where(logits_TN == 0, 0, jnp.where(jnp.isnan(logits_TN), jnp.nan, logits_TN))
    logits_TN = jnp.where(jnp.arange(n) < owned_columns(plan), logits_TN, -jnp.inf)
    values_TK, columns_TK = jax.lax.top_k(logits_TN, min(k, n))
    ids_TK = columns_TK.astype(jnp.int32) + partition.start(jax.lax.axis_index(axis_name))
    # In the order of the ranks: of equal logits top_k prefers the first, which has the lowest id. Padding comes last.
    gathered = [jax.lax.all_gather(each, axis_name, axis=1, tiled=True, to="invarying") for each in (values_TK, ids_TK)]
    values_TK, places_TK = jax.lax.top_k(gathered[0], k)
    ids_TK = jax.vmap(lambda ids_K, places_K: ids_K.at[places_K].get(mode="promise_in_bounds"))(gathered[1], places_TK)
    shape = *logits.shape[:-1], k
    return values_TK.reshape(shape), ids_TK.reshape(shape)


def _check_logits(logits: jax.Array, partition: VocabPartition, axis_name: str) -> None:
    check_axis(partition, axis_name)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise logits_dtype_error("logits", logits.dtype)
    check_logits_width(logits.shape[-1] if logits.ndim else 0, partition)
