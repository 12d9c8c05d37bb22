"""Lookups as pure functions of one rank's rows, inside a shard_map."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_impl.exchange import reduced_lookup as lookup_over_axis
from jax_impl.ids import as_ids, check_size_for_int32
from jax_impl.lookup import lookup
from jax_impl.private_api import varying_axes
from shared.checks import REDUCTIONS, check_choice, table_dtype_error
from shared.config import EmbeddingConfig
from shared.partition import VocabPartition

__all__ = ["check_axis", "check_rows", "check_same_on_ranks", "partial_lookup", "reduced_lookup"]


def partial_lookup(
    weight: jax.Array,
    ids: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
    *,
    padding_idx: int | None = None,
) -> jax.Array:
    """Look up the ids that this rank owns; others get +0.0.

    The ranks' results sum to the embedding. Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The
    position along that axis is the rank.

    Args:
        weight: the rank's rows, ``[partition.rows_per_rank, emb_size]``, float16, bfloat16, float32 or float64.
        ids: global ids, any shape, any integer dtype, the same on all ranks. Ids never wrap. Ids outside
            ``[0, vocab_size)``, negative ones included, give zero rows on every rank.
        partition: ownership of the rows; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        padding_idx: a global id whose row gets no gradient. It is looked up like any other.

    Returns:
        ``[*ids.shape, emb_size]`` in the weight's dtype, unreduced: varying over ``axis_name``. Rows are copied bit for
        bit, without a collective. ``jax.lax.psum`` over ``axis_name`` gives the embedding.

    A row's gradient is summed over its occurrences, data axes included, in float32 for 16-bit tables, and rounded once. See
    ``docs/contract.md``. Forward and reverse mode of any order.

    Raises:
        TypeError: ids are not an array of integers.
        ValueError: ``weight`` does not have ``partition.rows_per_rank`` rows, the axis does not have
            ``partition.world_size`` ranks, or ``padding_idx`` is out of range.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import partial_lookup
        >>> from shared import VocabPartition
        >>> w = jax.device_count()
        >>> mesh = jax.make_mesh((w,), ("tp",), (jax.sharding.AxisType.Auto,))
        >>> partition = VocabPartition(vocab_size=2 * w, world_size=w)
        >>> def embed(weight, ids):
        ...     return jax.lax.psum(partial_lookup(weight, ids, partition, "tp"), "tp")
        >>> embed = jax.jit(jax.shard_map(embed, mesh=mesh, in_specs=(P("tp", None), P()), out_specs=P()))
        >>> embed(jnp.arange(4.0 * w).reshape(2 * w, 2), jnp.array([1, 0, -1]))
        Array([[2., 3.],
               [0., 1.],
               [0., 0.]], dtype=float32)
    """
    config = _config(weight, partition, axis_name, padding_idx=padding_idx)
    return lookup(weight, _shared_ids(ids, partition, axis_name), config, axis_name)


def reduced_lookup(
    weight: jax.Array,
    ids: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
    *,
    reduction: str,
    exchange: str = "auto",
    seq_dim: int = -1,
    padding_idx: int | None = None,
) -> jax.Array:
    """Sum the ranks' ``partial_lookup`` over a mesh axis.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        weight: the rank's rows, ``[partition.rows_per_rank, emb_size]``, float16, bfloat16, float32 or float64.
        ids: global ids, any shape, any integer dtype. Ids never wrap. The same on all ranks, except for ``"all_to_all"``:
            there each rank passes its own, of one shape.
        partition: ownership of the rows; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        reduction: ``"all_reduce"``, the embedding on every rank; ``"reduce_scatter"``, this rank's chunk of it;
            ``"all_to_all"``, the embedding of this rank's own ids.
        exchange: ``"dense"``, a collective sums incomplete embeddings; ``"routed"``, owners send each distinct row to the
            ranks that need it; ``"auto"``, dense. Values are equal. ``"all_reduce"`` is always dense. ``"routed"`` falls
            back to dense if a rank needs more distinct rows of one owner than half its chunk has tokens.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits.
        padding_idx: a global id whose row gets no gradient. It is looked up like any other.

    Returns:
        ``[*ids.shape, emb_size]`` in the weight's dtype. For ``"all_reduce"`` it does not vary over ``axis_name``. For
        ``"reduce_scatter"`` dimension ``seq_dim`` is divided by ``partition.world_size``. Rows are copied bit for bit,
        except that an accelerator's sum may flush a subnormal number to zero and change a NaN's payload. Ids outside the
        vocabulary give +0.0.

    The gradient of ``"all_reduce"`` is local. For the others each rank receives the gradients of its rows. Sums are float32
    for 16-bit tables and rounded once. See ``docs/contract.md``. Forward and reverse mode of any order.

    Raises:
        TypeError: ids are not an array of integers.
        ValueError: an argument is out of range, ids that must be the same vary over ``axis_name``, or the sequence is not
            divisible by ``partition.world_size``.

    Source: Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053) and its sequence parallelism (Korthikanti et al., 2022,
    arXiv:2205.05198).

    Example:
        >>> import functools
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import reduced_lookup
        >>> from shared import VocabPartition
        >>> w = jax.device_count()
        >>> mesh = jax.make_mesh((w,), ("tp",), (jax.sharding.AxisType.Auto,))
        >>> partition = VocabPartition(vocab_size=2 * w, world_size=w)
        >>> embed = functools.partial(reduced_lookup, partition=partition, reduction="all_reduce")
        >>> embed = jax.jit(jax.shard_map(embed, mesh=mesh, in_specs=(P("tp", None), P()), out_specs=P()))
        >>> embed(jnp.arange(4.0 * w).reshape(2 * w, 2), jnp.array([1, 0, -1]))
        Array([[2., 3.],
               [0., 1.],
               [0., 0.]], dtype=float32)
    """
    check_choice("reduction", reduction, REDUCTIONS[1:])
    options = {"reduction": reduction, "exchange": exchange, "seq_dim": seq_dim, "padding_idx": padding_idx}
    config = _config(weight, partition, axis_name, **options)
    if reduction != "all_to_all":
        return lookup_over_axis(weight, _shared_ids(ids, partition, axis_name), config, axis_name)
    ids = jnp.asarray(as_ids(ids, partition.vocab_size))
    if axis_name not in varying_axes(ids):
        ids = jax.lax.pcast(ids, axis_name, to="varying")
    return lookup_over_axis(weight, ids, config, axis_name)


def _shared_ids(ids: ArrayLike, partition: VocabPartition, axis_name: str) -> jax.Array:
    ids = jnp.asarray(as_ids(ids, partition.vocab_size))
    check_same_on_ranks("ids", ids, axis_name)
    return ids


def _config(weight: jax.Array, partition: VocabPartition, axis_name: str, **options: Any) -> EmbeddingConfig:
    check_rows(weight, partition, axis_name)
    sizes = partition.vocab_size, weight.shape[1], partition.world_size, partition.padded_vocab_size
    return EmbeddingConfig(*sizes, **options)


def check_rows(weight: jax.Array, partition: VocabPartition, axis_name: str) -> None:
    """Validate the axis, and the weight as the rank's own rows."""
    check_axis(partition, axis_name)
    if weight.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise table_dtype_error(weight.dtype)
    if weight.ndim != 2 or weight.shape[0] != partition.rows_per_rank:
        raise ValueError(
            f"weight must hold the rank's own rows, [{partition.rows_per_rank}, emb_size], got {weight.shape}"
        )


def check_axis(partition: VocabPartition, axis_name: str) -> None:
    """Validate the axis's size and the ``check_vma`` of the enclosing shard_map."""
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be a string, the name of one mesh axis, got {axis_name!r}")
    check_size_for_int32(partition)
    size = jax.lax.axis_size(axis_name)
    if size != partition.world_size:
        raise ValueError(
            f"partition.world_size must be the size of the axis {axis_name!r}: got {partition.world_size}, "
            f"the axis has {size}"
        )
    if axis_name not in varying_axes(jax.lax.axis_index(axis_name)):
        raise ValueError("check_vma must be True in the shard_map around: without it gradients are too large")


def check_same_on_ranks(name: str, array: jax.Array, axis_name: str) -> None:
    """Refuse an argument that varies over the table's axis."""
    if axis_name in varying_axes(array):
        raise ValueError(
            f"{name} must be the same on all ranks of the axis {axis_name!r}, but they vary over it: pass them with an "
            f"in_specs that does not name the axis"
        )
