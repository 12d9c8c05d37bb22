"""The direct exchange: each distinct row goes from its one owner straight to the ranks that need it.

Every rank knows all the ids, so each works out what it sends and what it gets: no counts are exchanged. Shape suffixes: W
ranks, C tokens of a chunk, E columns, K rows that one rank may send to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_impl.lookup import as_integers, take_widened, take_zero_filled
from shared.partition import VocabPartition

__all__ = [
    "ChunkRoutes",
    "Take",
    "capacities",
    "most_worthwhile",
    "plan_routes",
    "send_bounded",
    "send_in_blocks",
    "send_ragged",
]

Take = Callable[[jax.Array, jax.Array], jax.Array]
"""Rows of a table by their number: bit for bit, or so that reverse mode can transpose it."""


class ChunkRoutes(NamedTuple):
    """Which distinct rows each chunk of the ids needs; the same on all ranks but for ``mine_C``.

    Attributes:
        wanted_WC: the distinct ids of each chunk, ascending, and past them the padded size of the vocabulary.
        bounds: ``[W, W + 1]``: those that rank o owns are ``wanted_WC[d, bounds[d, o] : bounds[d, o + 1]]``.
        mine_C: this rank's chunk of the ids; invalid ones are its padded size.
        places_C: where each of them is among the distinct ones.
    """

    wanted_WC: jax.Array
    bounds: jax.Array
    mine_C: jax.Array
    places_C: jax.Array

    @property
    def counts(self) -> jax.Array:
        """``[W, W]``: how many rows chunk d needs of owner o."""
        return jnp.diff(self.bounds, axis=1)


def plan_routes(ids_WC: jax.Array, partition: VocabPartition, rank: jax.Array) -> ChunkRoutes:
    """Who sends which rows to whom.

    Args:
        ids_WC: all the ids, chunk by chunk.
        partition: who owns what.
        rank: this rank.
    """
    n, w = partition.rows_per_rank, partition.world_size
    ids_WC = jnp.where(partition.is_valid(ids_WC), ids_WC, n * w).astype(jnp.int32)
    sorted_WC = jnp.sort(ids_WC, axis=1)
    place_WC = _places(sorted_WC)
    wanted_WC = jnp.full_like(sorted_WC, n * w).at[jnp.arange(w)[:, None], place_WC].set(sorted_WC)
    # jnp.searchsorted would be the word, but fails inside a shard_map that leaves axes to the compiler (jax 0.10.2).
    cuts = (jnp.arange(w + 1) * n).astype(jnp.int32)
    bounds = jnp.sum(wanted_WC[:, None, :] < cuts[:, None], axis=2, dtype=jnp.int32)
    mine_C = ids_WC[rank]
    ordered_C, order_C = jax.lax.sort_key_val(mine_C, jax.lax.broadcasted_iota(jnp.int32, mine_C.shape, 0))
    places_C = jnp.zeros_like(mine_C).at[order_C].set(_places(ordered_C), unique_indices=True)
    return ChunkRoutes(wanted_WC, bounds, mine_C, places_C)


def _places(ordered: jax.Array) -> jax.Array:
    """For ascending numbers, along the last axis, how many distinct ones come before each."""
    new = (ordered[..., 1:] != ordered[..., :-1]).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros_like(ordered[..., :1]), jnp.cumsum(new, axis=-1)], axis=-1)


def capacities(chunk: int) -> tuple[int, ...]:
    """How many rows one rank may send to another, by the programs that are compiled; a batch takes the first that fits.

    The first suits uniformly distributed ids, the others ids of which one rank owns the most.
    """
    return tuple(sorted({-(-chunk * sixteenths // 16) for sixteenths in (3, 8, 10)}))


def most_worthwhile(chunk: int) -> int:
    """How many rows one rank may send to another before the dense collective moves no more than the blocks do."""
    return -(-3 * chunk // 4)


def send_in_blocks(
    weight: jax.Array, routes: ChunkRoutes, partition: VocabPartition, axis_name: str, needed: jax.Array
) -> jax.Array:
    """The rows of this rank's chunk, ``[C, E]``, by ``all_to_all`` of a block of rows from each rank to each, until done.

    Blocks of a quarter of a megabyte stay in the cache and are written over by the next; one large exchange faults new
    memory in, which took longer than the copying. The number of blocks is the same on all ranks. For the forward alone:
    JAX does not transpose loops of unknown length.

    Args:
        weight: the rank's own rows.
        routes: who sends which rows to whom.
        partition: who owns what.
        axis_name: the mesh axis.
        needed: the most rows that one rank sends to another, the same on all devices.
    """
    rank, w, (chunk, emb_size) = (
        jax.lax.axis_index(axis_name),
        partition.world_size,
        (len(routes.mine_C), weight.shape[1]),
    )
    block = max(1, min(chunk, 2**18 // (emb_size * weight.dtype.itemsize)))
    as_bits = weight.dtype.itemsize == 2  # XLA selects among, and sends, 16-bit floats as float32 on a CPU
    within = jnp.arange(block, dtype=jnp.int32)
    wanted = jnp.pad(routes.wanted_WC, ((0, 0), (0, block)))

    def one_block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sent, received = state
        rows = []
        for destination in range(w):
            start = routes.bounds[destination, rank] + sent
            ids = jax.lax.dynamic_slice_in_dim(wanted[destination], start, block)
            # Past the last row that is needed, any row will do: it is not kept where it arrives.
            local = jnp.clip(partition.local_ids(ids, rank), 0, partition.rows_per_rank - 1)
            block_rows = weight.at[local].get(mode="promise_in_bounds")
            rows.append(as_integers(block_rows) if as_bits else block_rows)
        recv = jax.lax.all_to_all(jnp.stack(rows), axis_name, split_axis=0, concat_axis=0, tiled=True)
        for owner in range(w):
            start, stop = routes.bounds[rank, owner] + sent, routes.bounds[rank, owner + 1]
            start = jnp.minimum(start, chunk)  # of an owner that is done, nothing is kept
            present = jax.lax.dynamic_slice_in_dim(received, start, block)
            kept = jnp.where((start + within < stop)[:, None], recv[owner], present)
            received = jax.lax.dynamic_update_slice_in_dim(received, kept, start, axis=0)
        return sent + block, received

    dtype = jnp.uint16 if as_bits else weight.dtype
    varying = jax.typeof(weight).manual_axis_type.varying | jax.typeof(routes.mine_C).manual_axis_type.varying
    received = jax.lax.pcast(jnp.zeros((chunk + block, emb_size), dtype), tuple(varying), to="varying")
    _, received = jax.lax.while_loop(lambda state: state[0] < needed, one_block, (jnp.zeros_like(needed), received))
    output = take_zero_filled(received, jnp.where(routes.mine_C < partition.padded_vocab_size, routes.places_C, -1))
    return jax.lax.bitcast_convert_type(output, weight.dtype) if as_bits else output


def send_bounded(
    weight: jax.Array,
    routes: ChunkRoutes,
    partition: VocabPartition,
    axis_name: str,
    capacity: int,
    no_grad_row: jax.Array | None,
) -> jax.Array:
    """The rows of this rank's chunk, ``[C, E]``, by an ``all_to_all`` of ``capacity`` rows from each rank to each.

    All of it can be transposed.

    Args:
        weight: the rank's own rows.
        routes: who sends which rows to whom; none more than ``capacity``.
        partition: who owns what.
        axis_name: the mesh axis.
        capacity: K.
        no_grad_row: a row of ``weight`` that is not sent, or None.
    """
    rank, w = jax.lax.axis_index(axis_name), partition.world_size
    start = routes.bounds[:, rank, None]
    place = start + jnp.arange(capacity, dtype=jnp.int32)
    wanted_WK = jnp.take_along_axis(routes.wanted_WC, jnp.minimum(place, routes.wanted_WC.shape[1] - 1), axis=1)
    local_WK = jnp.where(place < routes.bounds[:, rank + 1, None], partition.local_ids(wanted_WK, rank), -1)
    if no_grad_row is not None:
        local_WK = jnp.where(local_WK == no_grad_row, -1, local_WK)
    rows_WKE = take_widened(weight, local_WK)
    recv = jax.lax.all_to_all(rows_WKE, axis_name, split_axis=0, concat_axis=0, tiled=True)
    owner_C = routes.mine_C // partition.rows_per_rank
    within_C = routes.places_C - jnp.take(routes.bounds[rank], owner_C, mode="clip")
    slot_C = jnp.where(owner_C < w, owner_C * capacity + within_C, -1)
    return take_zero_filled(recv.reshape(w * capacity, weight.shape[1]), slot_C)


def send_ragged(
    take: Take,
    weight: jax.Array,
    routes: ChunkRoutes,
    partition: VocabPartition,
    axis_name: str,
    capacity: int,
    no_grad_row: jax.Array | None,
) -> jax.Array:
    """The same by a ``ragged_all_to_all`` of just the rows that are needed.

    Args:
        take: looks rows up.
        weight, routes, partition, axis_name, no_grad_row: as for ``send_bounded``.
        capacity: how many rows one rank may send in all.
    """
    rank, w = jax.lax.axis_index(axis_name), partition.world_size
    counts = routes.counts
    send_sizes, recv_sizes = counts[:, rank], counts[rank]
    input_offsets = jnp.cumsum(send_sizes) - send_sizes
    # Row k of what is sent goes to the last rank whose part begins at or before it.
    place = jnp.arange(capacity, dtype=jnp.int32)
    destination = jnp.sum(place[:, None] >= jnp.cumsum(send_sizes), axis=1, dtype=jnp.int32)
    inside = destination < w
    destination = jnp.minimum(destination, w - 1)
    within = routes.bounds[destination, rank] + place - input_offsets[destination]
    wanted = routes.wanted_WC[destination, jnp.clip(within, 0, routes.wanted_WC.shape[1] - 1)]
    local = jnp.where(inside, partition.local_ids(wanted, rank), -1)
    if no_grad_row is not None:
        local = jnp.where(local == no_grad_row, -1, local)
    rows = take(weight, local)
    recv = jnp.zeros((routes.mine_C.shape[0], weight.shape[1]), rows.dtype)
    recv = jax.lax.ragged_all_to_all(
        rows,
        jax.lax.pcast(recv, tuple(jax.typeof(rows).manual_axis_type.varying), to="varying"),
        *(x.astype(jnp.int32) for x in (input_offsets, send_sizes, routes.bounds[:, rank], recv_sizes)),
        axis_name=axis_name,
    )
    return take_zero_filled(recv, jnp.where(routes.mine_C < partition.padded_vocab_size, routes.places_C, -1))
