"""The lookup as a pure function of one rank's rows, for use inside a shard_map."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

from shared.checks import check_padding_idx, ids_type_error, invalid_id_error
from shared.ids import check_ids_valid, widen
from shared.partition import VocabPartition

__all__ = ["as_ids", "check_ids", "partial_lookup"]


def partial_lookup(
    weight: jax.Array,
    ids: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
    *,
    padding_idx: int | None = None,
) -> jax.Array:
    """Look up the ids that this rank owns; every other id gets a row of +0.0. The ranks' results sum to the embedding.

    To be called inside a ``jax.shard_map`` that is manual over ``axis_name``; the rank is the position along that axis.

    Args:
        weight: the rank's own rows, ``[partition.rows_per_rank, emb_size]``, any floating dtype.
        ids: global ids, any shape, any integer dtype; no dtype wraps. Ids outside ``[0, vocab_size)``, negative ones
            included, give zero rows on every rank.
        partition: who owns what; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis over which the vocabulary is split.
        padding_idx: a global id whose row gets no gradient. Its row is looked up like any other.

    Returns:
        ``[*ids.shape, emb_size]`` in the weight's dtype, unreduced: varying over ``axis_name``. Rows are copied bit for
        bit, without any collective. Add them with ``jax.lax.psum`` where the embedding itself is wanted.

    The weight's gradient sums a row's occurrences in float32 for 16-bit tables (in the table's dtype otherwise), over
    data-parallel axes too, and rounds once. Forward and reverse mode work to any order.

    Raises:
        TypeError: ids are not an array of integers.
        ValueError: ``weight`` does not have ``partition.rows_per_rank`` rows, the axis another size than
            ``partition.world_size``, or ``padding_idx`` is out of range.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> from jax.sharding import PartitionSpec as P
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
    if weight.ndim != 2 or weight.shape[0] != partition.rows_per_rank:
        raise ValueError(
            f"weight must hold the rank's own rows, [{partition.rows_per_rank}, emb_size], got {weight.shape}"
        )
    size = jax.lax.axis_size(axis_name)
    if size != partition.world_size:
        raise ValueError(
            f"partition.world_size must be the size of the axis {axis_name!r}: got {partition.world_size}, "
            f"the axis has {size}"
        )
    check_padding_idx(padding_idx, partition.vocab_size)
    rank = jax.lax.axis_index(axis_name)
    ids = _checked_array(ids)
    # Foreign ids are set aside before anything else: indexing narrows 64-bit indices to 32 bits without a word.
    local = jnp.where(partition.owns(ids, rank), partition.local_ids(ids, rank), -1).astype(jnp.int32)
    no_grad_row = None if padding_idx is None else partition.local_ids(padding_idx, rank)
    return _lookup_rows(weight, local, no_grad_row)


def as_ids(ids: Any, vocab_size: int) -> Any:
    """Ids as an array that JAX takes without narrowing: those of NumPy are range-checked before they become int32.

    A 64-bit id that is no id of the vocabulary becomes -1, never another id. ``jax.jit`` narrows NumPy arguments at its
    door, before any code of the function runs: call this on 64-bit NumPy ids that go into a jitted function of your own.

    Args:
        ids: a JAX array (returned as it is), a NumPy array or a number, of any integer dtype.
        vocab_size: rows of the whole table, at most ``2**31 - 1``.

    Raises:
        TypeError: ids are not an array of integers.

    Example:
        >>> as_ids(np.array([7, 2**32 + 7]), vocab_size=10)
        array([ 7, -1], dtype=int32)
    """
    if isinstance(ids, jax.Array):
        return _checked_array(ids)
    if not isinstance(ids, (np.ndarray, np.generic, int)) or isinstance(ids, bool):
        raise ids_type_error(type(ids).__name__, "a JAX or NumPy array")
    wide = widen(np.asarray(ids))
    return np.where((wide >= 0) & (wide < vocab_size), wide, -1).astype(np.int32)


def check_ids(ids: Any, vocab_size: int) -> None:
    """Refuse ids outside ``[0, vocab_size)``: at once where they are known, with ``checkify`` where they are traced.

    Raises:
        IndexError: naming the first such id in row-major order, its position and the legal range.
        TypeError: ids are not an array of integers.
    """
    if not isinstance(ids, jax.core.Tracer):
        as_ids(ids, vocab_size)
        if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
            assert isinstance(ids.sharding, NamedSharding)
            ids = jax.device_put(ids, NamedSharding(ids.sharding.mesh, PartitionSpec()))
        check_ids_valid(np.asarray(ids), vocab_size)
        return
    _checked_array(ids)
    if ids.size == 0:
        return
    if not jax.typeof(ids).sharding.mesh.empty and jax.typeof(ids).sharding.mesh.are_all_axes_explicit:
        ids = jax.sharding.reshard(ids, NamedSharding(jax.typeof(ids).sharding.mesh, PartitionSpec(*[None] * ids.ndim)))
    bad = ((ids < 0) | (ids >= vocab_size)).ravel()
    first = jnp.argmax(bad)
    position = jnp.unravel_index(first, ids.shape)
    names: dict[str, Any] = {f"i{n}": index for n, index in enumerate(position)}
    message = str(invalid_id_error(0, range(ids.ndim), vocab_size))
    _, _, rule = message.partition(" = 0 ")
    where = f"ids[{', '.join('{' + name + '}' for name in names)}]" if names else "ids"
    checkify.check(~bad[first], f"{where} = {{value}} {rule}", value=ids.ravel()[first], **names)


def _checked_array(ids: Any) -> Any:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ids_type_error(f"dtype {ids.dtype}", "an array")
    return ids


def _take(weight: jax.Array, local: jax.Array) -> jax.Array:
    # Neither jnp.take nor plain indexing: they wrap negative indices, and give NaN or another row past the end.
    return weight.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_jvp
def _lookup_rows(weight: jax.Array, local: jax.Array, no_grad_row: jax.Array | None) -> jax.Array:
    return _take(weight, local)


@_lookup_rows.defjvp
def _lookup_rows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weight, local, no_grad_row = primals
    weight_dot = tangents[0]
    # Reverse mode transposes these lines: 16-bit gradients are then added up in float32, across devices too, and rounded
    # once. The cast of the whole table is only ever computed in forward mode.
    if weight.dtype.itemsize < 4:
        weight_dot = weight_dot.astype(jnp.float32)
    counted = local if no_grad_row is None else jnp.where(local == no_grad_row, -1, local)
    return _lookup_rows(weight, local, no_grad_row), _take(weight_dot, counted).astype(weight.dtype)
