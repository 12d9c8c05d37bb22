"""Lookups reduced over ranks: all_reduce, reduce_scatter and all_to_all.

Every rank knows all ids, or gathers them. It computes from them what it sends and receives: no counts are exchanged.
Shape suffixes: W ranks, C tokens of a chunk, E columns, K rows that one rank may send to another.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_impl.lookup import gather, linear_gather, linear_lookup
from jax_impl.private_api import all_gather_invarying, varying_axes
from shared.config import EmbeddingConfig
from shared.sequence import chunk_shape, resolve_seq_dim

__all__ = ["linear_reduced_lookup", "reduced_lookup"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def reduced_lookup(weight: jax.Array, ids: jax.Array, config: EmbeddingConfig, axis_name: str) -> jax.Array:
    """Look ids up in a table split over ranks.

    Args:
        weight: the rank's rows, ``[N, E]``.
        ids: any shape, as ``as_ids`` returns them; the same on all ranks except for ``"all_to_all"``.
        config: options; ``reduction`` is not ``"none"``.
        axis_name: the mesh axis of the ranks.

    Returns:
        ``[*ids.shape, E]``; for ``"reduce_scatter"`` this rank's chunk of it.
    """
    if ids.size == 0:
        return _nothing(weight, ids, config, axis_name)
    if config.reduction == "all_to_all":
        return _of_own_ids(reduced_lookup, weight, ids, config, axis_name)
    collective = _collective(ids, config, axis_name)

    def dense() -> jax.Array:
        return _sum_over_ranks(weight, ids, config, axis_name, collective)

    if config.reduction == "all_reduce" or config.exchange != "routed" or config.world_size == 1:
        return dense()

    def routed(routes: _Routes) -> jax.Array:
        recv = gather(weight, routes.send_WK, functools.partial(_all_to_all, axis_name=axis_name))
        return gather(recv, routes.slots)

    return _if_it_fits(_plan_routes(ids, config, axis_name), routed, dense)


@reduced_lookup.defjvp
def _(
    config: EmbeddingConfig, axis_name: str, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    weight, ids = primals
    return reduced_lookup(weight, ids, config, axis_name), linear_reduced_lookup(tangents[0], ids, config, axis_name)


def linear_reduced_lookup(weight: jax.Array, ids: jax.Array, config: EmbeddingConfig, axis_name: str) -> jax.Array:
    """Linear map whose transpose is the gradient of ``reduced_lookup``."""
    if ids.size == 0:
        return _nothing(weight, ids, config, axis_name)
    if config.reduction == "all_to_all":
        return _of_own_ids(linear_reduced_lookup, weight, ids, config, axis_name)

    def dense() -> jax.Array:
        return _collective(ids, config, axis_name)(linear_lookup(weight, ids, config, axis_name))

    # To be rounded once, 16-bit gradients would travel as float32 sums: no fewer bytes than dense.
    direct = weight.dtype.itemsize < 4 or config.world_size == 1
    if config.reduction == "all_reduce" or config.exchange != "routed" or direct:
        return dense()

    def routed(routes: _Routes) -> jax.Array:
        recv = _all_to_all(linear_gather(weight, routes.send_WK), axis_name)
        return linear_gather(recv, routes.slots)

    return _if_it_fits(_plan_routes(ids, config, axis_name, gradient=True), routed, dense)


def _of_own_ids(
    reduced: Callable[..., jax.Array], weight: jax.Array, ids: jax.Array, config: EmbeddingConfig, axis_name: str
) -> jax.Array:
    """All-gather the ids; the rank's own are its reduce_scatter chunk."""
    ids_WC = all_gather_invarying(ids.reshape(-1), axis_name, tiled=False)
    rows = reduced(weight, ids_WC, replace(config, reduction="reduce_scatter", seq_dim=0), axis_name)
    return rows.reshape(*ids.shape, weight.shape[1])


def _nothing(weight: jax.Array, ids: jax.Array, config: EmbeddingConfig, axis_name: str) -> jax.Array:
    """Return the empty embedding of no ids."""
    varying, shape = varying_axes(ids) | (varying_axes(weight) - {axis_name}), ids.shape
    if config.reduction == "reduce_scatter":
        varying, shape = varying | {axis_name}, chunk_shape(shape, config.seq_dim, config.world_size)
    elif config.reduction == "all_to_all":
        varying |= {axis_name}
    zeros = jnp.zeros((*shape, weight.shape[1]), weight.dtype)
    return jax.lax.pcast(zeros, tuple(sorted(varying)), to="varying") if varying else zeros


def _collective(ids: jax.Array, config: EmbeddingConfig, axis_name: str) -> Callable[[jax.Array], jax.Array]:
    """Collective that sums the ranks' incomplete embeddings."""
    if config.reduction == "all_reduce":
        if config.world_size == 1:  # XLA fails to compile psum over one device beside Auto axes (jax 0.8.2 to 0.12.0.1)
            return functools.partial(all_gather_invarying, axis_name=axis_name)
        return functools.partial(jax.lax.psum, axis_name=axis_name)
    chunk_shape(ids.shape, config.seq_dim, config.world_size)  # refuses an indivisible sequence
    dim = resolve_seq_dim(ids.ndim, config.seq_dim)
    return functools.partial(jax.lax.psum_scatter, axis_name=axis_name, scatter_dimension=dim, tiled=True)


def _sum_over_ranks(
    weight: jax.Array,
    ids: jax.Array,
    config: EmbeddingConfig,
    axis_name: str,
    collective: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sum the ranks' incomplete embeddings.

    Rows of foreign ids are -0.0, the identity of addition: +0.0 would turn -0.0 into +0.0. For an id outside the vocabulary
    rank 0 contributes +0.0.
    """
    rank = jax.lax.axis_index(axis_name)
    fill = jnp.where((rank == 0) & ~config.partition.is_valid(ids), 0.0, -0.0).astype(weight.dtype)
    return gather(weight, config.partition.keys(ids, rank), collective, fill[..., None])


class _Routes(NamedTuple):
    """Distinct rows that this rank sends, and slots of those it receives.

    Attributes:
        send_WK: rows of this rank's table for each chunk, ascending; unused entries hold the number of rows.
        slots: for each token of this rank's chunk, its row among the ``W * K`` received; ``W * K`` for an id outside the
            vocabulary and, in gradients, for ``padding_idx``.
        fits: whether no rank needs more than ``K`` rows of another; the same on all devices.
    """

    send_WK: jax.Array
    slots: jax.Array
    fits: jax.Array


def _plan_routes(ids: jax.Array, config: EmbeddingConfig, axis_name: str, gradient: bool = False) -> _Routes:
    """Compute routes from the ids alone, which all ranks have.

    Each chunk's ids are sorted, so that equal ids are adjacent; the first of them stands for the row. A rank receives into
    ``capacity`` slots per owner: the k-th distinct row that its chunk needs of an owner arrives in the k-th of these.
    """
    partition, w, rank = config.partition, config.world_size, jax.lax.axis_index(axis_name)
    n, none = partition.rows_per_rank, partition.padded_vocab_size
    shape, dim = chunk_shape(ids.shape, config.seq_dim, w), resolve_seq_dim(ids.ndim, config.seq_dim)
    ids_WC = jnp.moveaxis(ids.reshape(*ids.shape[:dim], w, shape[dim], *ids.shape[dim + 1 :]), dim, 0).reshape(w, -1)
    known = partition.is_valid(ids_WC)
    if gradient and config.padding_idx is not None:
        known &= ids_WC != config.padding_idx
    ids_WC = jnp.where(known, ids_WC, none).astype(jnp.int32)
    # Half a chunk: all_to_all then moves half the bytes of the dense form. Zipf-distributed ids need 0.35 to 0.48 of a chunk
    # from the first of 8 ranks, uniform ids 1 / w. With a smaller capacity, real text would always fall back to dense.
    capacity = -(-ids_WC.shape[1] // 2)
    sorted_WC, order_WC = jax.lax.sort_key_val(ids_WC, jax.lax.broadcasted_iota(jnp.int32, ids_WC.shape, 1))
    first_WC = jnp.pad(sorted_WC[:, 1:] != sorted_WC[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    place_WC = jnp.cumsum(first_WC.astype(jnp.int32), axis=1) - 1  # among the chunk's distinct ids
    # Number of each chunk's distinct ids below each rank's rows.
    cuts = (jnp.arange(w + 1) * n).astype(jnp.int32)
    below = jnp.sum(first_WC[:, None, :] & (sorted_WC[:, None, :] < cuts[:, None]), axis=2, dtype=jnp.int32)
    keys_WC = jnp.where(first_WC, partition.keys(sorted_WC, rank), n)
    mine_C, order_C = ids_WC[rank], order_WC[rank]
    place_C = jnp.zeros_like(order_C).at[order_C].set(place_WC[rank], unique_indices=True)
    owner_C = jnp.minimum(mine_C // n, w - 1)
    slots_C = jnp.where(mine_C < none, owner_C * capacity + place_C - below[rank][owner_C], w * capacity)
    needed = _most_of_batch(jnp.diff(below, axis=1).max())
    # Devices along the ids' other axes must take the same branch too.
    if others := tuple(sorted(varying_axes(needed))):
        needed = jax.lax.pmax(needed, others)
    return _Routes(jnp.sort(keys_WC, axis=1)[:, :capacity], slots_C.reshape(shape), needed <= capacity)


@jax.custom_batching.custom_vmap
def _most_of_batch(count: jax.Array) -> jax.Array:
    """Return the count; under vmap, the greatest of the batch.

    The batch then takes one branch: a cond with a batched predicate cannot be transposed (jax 0.10.2).
    """
    return count


@_most_of_batch.def_vmap
def _(_size: int, _batched: Any, counts: jax.Array) -> tuple[jax.Array, bool]:
    return _most_of_batch(counts.max(axis=0)), False


def _if_it_fits(routes: _Routes, routed: Callable[[_Routes], jax.Array], dense: Callable[[], jax.Array]) -> jax.Array:
    return jax.lax.cond(routes.fits, routed, lambda _: dense(), routes)


def _all_to_all(rows_WKE: jax.Array, axis_name: str) -> jax.Array:
    recv = jax.lax.all_to_all(rows_WKE, axis_name, split_axis=0, concat_axis=0, tiled=True)
    return recv.reshape(-1, rows_WKE.shape[-1])
