"""From each rank's incomplete embedding to the embedding: on every rank, or split along the sequence.

Shape suffixes: W ranks, C tokens of a chunk, T tokens in all, E columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_impl.exchange import (
    ChunkRoutes,
    capacities,
    most_worthwhile,
    plan_routes,
    send_bounded,
    send_in_blocks,
    send_ragged,
)
from jax_impl.rows import as_integers, take_zero_filled, widened
from shared.partition import VocabPartition
from shared.sequence import chunk_shape, resolve_seq_dim

__all__ = ["ReductionOptions", "choose_exchange", "reduce_lookup"]


@dataclass(frozen=True)
class ReductionOptions:
    """How a lookup is reduced.

    Attributes:
        partition: who owns what.
        axis_name: the mesh axis of the ranks.
        reduction: ``"all_reduce"`` or ``"reduce_scatter"``.
        exchange: ``"dense"``, ``"routed"`` or ``"auto"``.
        seq_dim: for reduce_scatter, the dimension of the ids that is split.
        padding_idx: a global id whose row gets no gradient, or None.
    """

    partition: VocabPartition
    axis_name: str
    reduction: str
    exchange: str
    seq_dim: int
    padding_idx: int | None


def choose_exchange(exchange: str, reduction: str, num_tokens: int, row_bytes: int, world_size: int) -> str:
    """``"dense"`` or ``"routed"``: what ``"auto"`` stands for, known when the program is compiled.

    Args:
        exchange: returned as it is, unless it is ``"auto"``.
        reduction: ``"all_reduce"`` or ``"reduce_scatter"``.
        num_tokens: ids in all that the ranks of the axis share.
        row_bytes: bytes of a row.
        world_size: number of ranks.
    """
    if exchange != "auto":
        return exchange
    return "routed"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reduce_lookup(options: ReductionOptions, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """The embedding of ``ids``: whole for all_reduce, this rank's chunk for reduce_scatter.

    Rows travel as integers: no addition turns -0.0 into 0.0, flushes a subnormal number or makes another NaN of NaN.
    """
    bits = as_integers(weight)
    if options.reduction == "all_reduce":
        output = _all_reduce(options, bits, ids)
    else:
        output = _reduce_scatter(options, bits, ids, None)
    return jax.lax.bitcast_convert_type(output, weight.dtype)


@reduce_lookup.defjvp
def _reduce_lookup_jvp(options: ReductionOptions, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (weight, ids), weight_dot = primals, tangents[0]
    # Reverse mode transposes these lines. That of all_reduce is then local, whatever way the rows went.
    no_grad_row = None
    if options.padding_idx is not None:
        no_grad_row = options.partition.local_ids(options.padding_idx, jax.lax.axis_index(options.axis_name))
    wide = widened(weight_dot)
    if options.reduction == "all_reduce":
        partial = take_zero_filled(wide, _local(options, ids, no_grad_row)).astype(weight.dtype)
        tangent = jax.lax.psum(partial, options.axis_name)
    else:
        tangent = _reduce_scatter(options, wide, ids, no_grad_row, weight.dtype)
    return reduce_lookup(options, weight, ids), tangent


def _local(options: ReductionOptions, ids: jax.Array, no_grad_row: jax.Array | None) -> jax.Array:
    """Row numbers in this rank's table, -1 where it has no such row."""
    partition, rank = options.partition, jax.lax.axis_index(options.axis_name)
    local = jnp.where(partition.owns(ids, rank), partition.local_ids(ids, rank), -1).astype(jnp.int32)
    return local if no_grad_row is None else jnp.where(local == no_grad_row, -1, local)


def _all_reduce(options: ReductionOptions, rows: jax.Array, ids: jax.Array) -> jax.Array:
    w, tokens = options.partition.world_size, ids.size

    def dense() -> jax.Array:
        partial = take_zero_filled(rows, _local(options, ids, None))
        return _in_pairs(partial, lambda partial: jax.lax.psum(partial, options.axis_name))

    if _exchange(options, rows, ids) == "dense":
        return dense()
    # Each rank collects the rows of a chunk, and gives them to all.
    chunk = -(-tokens // w)
    ids_WC = jnp.pad(ids.reshape(-1), (0, chunk * w - tokens), constant_values=-1).reshape(w, chunk)

    def whole(chunk_CE: jax.Array) -> jax.Array:
        everything = jax.lax.all_gather(chunk_CE, options.axis_name, tiled=True, to="invarying")
        return everything[:tokens].reshape(*ids.shape, rows.shape[1])

    return _routed(options, rows, ids_WC, None, whole, dense)


def _reduce_scatter(
    options: ReductionOptions, rows: jax.Array, ids: jax.Array, no_grad_row: jax.Array | None, dtype: Any = None
) -> jax.Array:
    """This rank's chunk, cast to ``dtype``; 16-bit numbers that are added up travel in float32 only where they must."""
    w = options.partition.world_size
    shape = chunk_shape(ids.shape, options.seq_dim, w)
    dim = resolve_seq_dim(ids.ndim, options.seq_dim)
    ids_by_chunk = jnp.moveaxis(ids.reshape(*ids.shape[:dim], w, shape[dim], *ids.shape[dim + 1 :]), dim, 0)
    ids_WC = ids_by_chunk.reshape(w, ids.size // w)
    output_dtype = rows.dtype if dtype is None else dtype

    def finish(chunk_CE: jax.Array) -> jax.Array:
        return chunk_CE.astype(output_dtype).reshape(*shape, rows.shape[1])

    def dense() -> jax.Array:
        partial_TE = take_zero_filled(rows, _local(options, ids_WC, no_grad_row).reshape(-1)).astype(output_dtype)
        scatter = functools.partial(jax.lax.psum_scatter, axis_name=options.axis_name, scatter_dimension=0, tiled=True)
        return finish(_in_pairs(partial_TE, scatter))

    if _exchange(options, rows, ids) == "dense":
        return dense()
    return _routed(options, rows, ids_WC, no_grad_row, finish, dense, differentiable=dtype is not None)


def _in_pairs(rows: jax.Array, collective: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A sum over ranks of which all but one have zeros; 16-bit integers in pairs, which XLA would widen on a CPU."""
    if rows.dtype != jnp.uint16 or rows.shape[-1] % 2:
        return collective(rows)
    pairs = rows.reshape(*rows.shape[:-1], rows.shape[-1] // 2, 2)
    output = jax.lax.bitcast_convert_type(collective(jax.lax.bitcast_convert_type(pairs, jnp.uint32)), jnp.uint16)
    return output.reshape(*output.shape[:-2], rows.shape[-1])


def _routed(
    options: ReductionOptions,
    rows: jax.Array,
    ids_WC: jax.Array,
    no_grad_row: jax.Array | None,
    finish: Callable[[jax.Array], jax.Array],
    dense: Callable[[], jax.Array],
    differentiable: bool = False,
) -> jax.Array:
    """The exchange of the least capacity that the ids fit in, or else the dense one: the same on every device."""
    partition, axis_name, (w, chunk) = options.partition, options.axis_name, ids_WC.shape
    routes = plan_routes(ids_WC, partition, jax.lax.axis_index(axis_name))

    def choose(send: Callable[[int], jax.Array], bounds: tuple[int, ...], needed: jax.Array) -> jax.Array:
        programs = [lambda bound=bound: finish(send(bound)) for bound in bounds]
        needed = _the_most_of_all(needed, axis_name)
        return jax.lax.switch(sum((needed > bound).astype(jnp.int32) for bound in bounds), [*programs, dense])

    def in_blocks(routes: ChunkRoutes) -> jax.Array:
        send = lambda _: send_in_blocks(rows, routes, partition, axis_name)  # noqa: E731
        return choose(send, (most_worthwhile(chunk),), routes.counts.max())

    def bounded(routes: ChunkRoutes) -> jax.Array:
        send = lambda bound: send_bounded(rows, routes, partition, axis_name, bound, no_grad_row)  # noqa: E731
        return choose(send, capacities(chunk), routes.counts.max())

    def ragged(routes: ChunkRoutes) -> jax.Array:
        send = lambda bound: send_ragged(rows, routes, partition, axis_name, bound, no_grad_row)  # noqa: E731
        return choose(send, (-(-chunk * w // 2),), routes.counts.sum(axis=0).max())

    # XLA has no ragged_all_to_all for CPUs.
    on_cpu = bounded if differentiable else in_blocks
    return jax.lax.platform_dependent(routes, cpu=on_cpu, default=ragged)


def _the_most_of_all(count: jax.Array, axis_name: str) -> jax.Array:
    """The largest of the devices' counts, so that all of them take the same branch; without the axis they agree over."""
    others = tuple(jax.typeof(count).manual_axis_type.varying - {axis_name})
    return jax.lax.pmax(count, others) if others else count


def _exchange(options: ReductionOptions, rows: jax.Array, ids: jax.Array) -> str:
    if ids.size == 0:
        return "dense"
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    return choose_exchange(options.exchange, options.reduction, ids.size, row_bytes, options.partition.world_size)
