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
from jax_impl.lookup import take_bits, take_rows, take_widened
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


def choose_exchange(exchange: str, num_tokens: int, row_bytes: int) -> str:
    """``"dense"`` or ``"routed"``: what ``"auto"`` stands for, known when the program is compiled.

    Routed, where the embedding of all tokens has 32 MiB or more: from there on it was faster on a CPU for w = 2, 4 and 8,
    uniform and Zipf-distributed ids, by up to 2.5 times, and never behind by more than a tenth; below, the dense
    collective was up to 1.6 times faster. (``python -m benchmarks`` measures it again.) On accelerators, where nothing has
    been measured, ``"auto"`` stands for dense.

    Args:
        exchange: returned as it is, unless it is ``"auto"``.
        num_tokens: ids in all that the ranks of the axis share.
        row_bytes: bytes of a row.
    """
    if exchange != "auto":
        return exchange
    return "routed" if num_tokens * row_bytes >= 2**25 else "dense"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reduce_lookup(options: ReductionOptions, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """The embedding of ``ids``: whole for all_reduce, this rank's chunk for reduce_scatter.

    Where rows are added to zeros, they are integers: no addition turns -0.0 into 0.0, flushes a subnormal number or makes
    another NaN of NaN.
    """
    if ids.size == 0:
        return _nothing(options, ids, weight)
    return (_all_reduce if options.reduction == "all_reduce" else _reduce_scatter)(options, weight, ids)


@reduce_lookup.defjvp
def _reduce_lookup_jvp(options: ReductionOptions, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (weight, ids), weight_dot = primals, tangents[0]
    if ids.size == 0:
        return _nothing(options, ids, weight), _nothing(options, ids, weight)
    # Reverse mode transposes these lines. That of all_reduce is then local, whatever way the rows went.
    no_grad_row = None
    if options.padding_idx is not None:
        no_grad_row = options.partition.local_ids(options.padding_idx, jax.lax.axis_index(options.axis_name))
    if options.reduction == "all_reduce":
        partial = take_widened(weight_dot, _local(options, ids, no_grad_row)).astype(weight.dtype)
        tangent = jax.lax.psum(partial, options.axis_name)
    else:
        tangent = _reduce_scatter(options, weight_dot, ids, no_grad_row, weight.dtype)
    return reduce_lookup(options, weight, ids), tangent


def _nothing(options: ReductionOptions, ids: jax.Array, weight: jax.Array) -> jax.Array:
    """The embedding of no ids."""
    varying, shape = set(jax.typeof(ids).manual_axis_type.varying), ids.shape
    if options.reduction == "reduce_scatter":
        varying.add(options.axis_name)
        shape = chunk_shape(shape, options.seq_dim, options.partition.world_size)
    zeros = jnp.zeros((*shape, weight.shape[1]), weight.dtype)
    return jax.lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros


def _local(options: ReductionOptions, ids: jax.Array, no_grad_row: jax.Array | None) -> jax.Array:
    """Row numbers in this rank's table, -1 where it has no such row."""
    partition, rank = options.partition, jax.lax.axis_index(options.axis_name)
    local = jnp.where(partition.owns(ids, rank), partition.local_ids(ids, rank), -1).astype(jnp.int32)
    return local if no_grad_row is None else jnp.where(local == no_grad_row, -1, local)


def _all_reduce(options: ReductionOptions, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of all ids, on every rank."""
    w, tokens = options.partition.world_size, ids.size

    def dense() -> jax.Array:
        return _added_up(weight, _local(options, ids, None), lambda bits: jax.lax.psum(bits, options.axis_name))

    if _exchange(options, weight, ids) == "dense":
        return dense()
    # Each rank collects the rows of a chunk, and gives them to all.
    chunk = -(-tokens // w)
    ids_WC = jnp.pad(ids.reshape(-1), (0, chunk * w - tokens), constant_values=-1).reshape(w, chunk)

    def whole(chunk_CE: jax.Array) -> jax.Array:
        everything = jax.lax.all_gather(chunk_CE, options.axis_name, tiled=True, to="invarying")
        return everything[:tokens].reshape(*ids.shape, weight.shape[1])

    return _routed(options, weight, ids_WC, whole, dense)


def _reduce_scatter(
    options: ReductionOptions,
    weight: jax.Array,
    ids: jax.Array,
    no_grad_row: jax.Array | None = None,
    tangent_dtype: Any = None,
) -> jax.Array:
    """The rows of this rank's chunk; with a ``tangent_dtype`` in operations that can be transposed, and cast to it."""
    w = options.partition.world_size
    shape = chunk_shape(ids.shape, options.seq_dim, w)
    dim = resolve_seq_dim(ids.ndim, options.seq_dim)
    ids_by_chunk = jnp.moveaxis(ids.reshape(*ids.shape[:dim], w, shape[dim], *ids.shape[dim + 1 :]), dim, 0)
    ids_WC = ids_by_chunk.reshape(w, ids.size // w)

    scatter = functools.partial(jax.lax.psum_scatter, axis_name=options.axis_name, scatter_dimension=0, tiled=True)

    def finish(chunk_CE: jax.Array) -> jax.Array:
        chunk_CE = chunk_CE if tangent_dtype is None else chunk_CE.astype(tangent_dtype)
        return chunk_CE.reshape(*shape, weight.shape[1])

    def dense() -> jax.Array:
        local_T = _local(options, ids_WC, no_grad_row).reshape(-1)
        if tangent_dtype is None:
            return finish(_added_up(weight, local_T, scatter))
        # Cast before the sum, so that 16-bit gradients travel as such.
        return finish(scatter(take_widened(weight, local_T).astype(tangent_dtype)))

    if _exchange(options, weight, ids) == "dense":
        return dense()
    return _routed(options, weight, ids_WC, finish, dense, no_grad_row, transposable=tangent_dtype is not None)


def _added_up(weight: jax.Array, local: jax.Array, collective: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The sum over ranks of rows that all but one of them have as zeros, by integers, 16-bit ones two at a time.

    XLA would widen the latter on a CPU.
    """
    bits = take_bits(weight, local)
    if bits.dtype != jnp.uint16 or bits.shape[-1] % 2:
        return jax.lax.bitcast_convert_type(collective(bits), weight.dtype)
    pairs = bits.reshape(*bits.shape[:-1], bits.shape[-1] // 2, 2)
    output = jax.lax.bitcast_convert_type(collective(jax.lax.bitcast_convert_type(pairs, jnp.uint32)), weight.dtype)
    return output.reshape(*output.shape[:-2], bits.shape[-1])


def _routed(
    options: ReductionOptions,
    weight: jax.Array,
    ids_WC: jax.Array,
    finish: Callable[[jax.Array], jax.Array],
    dense: Callable[[], jax.Array],
    no_grad_row: jax.Array | None = None,
    transposable: bool = False,
) -> jax.Array:
    """The exchange of the least capacity that the ids fit in, or else the dense one: the same on every device."""
    partition, axis_name, (w, chunk) = options.partition, options.axis_name, ids_WC.shape
    routes = plan_routes(ids_WC, partition, jax.lax.axis_index(axis_name))

    def choose(send: Callable[[int], jax.Array], bounds: tuple[int, ...], needed: jax.Array) -> jax.Array:
        programs = [lambda bound=bound: finish(send(bound)) for bound in bounds]
        return jax.lax.switch(sum((needed > bound).astype(jnp.int32) for bound in bounds), [*programs, dense])

    def in_blocks(routes: ChunkRoutes) -> jax.Array:
        needed = _the_most_of_all(routes.counts.max(), axis_name)
        send = lambda _: send_in_blocks(weight, routes, partition, axis_name, needed)  # noqa: E731
        return choose(send, (most_worthwhile(chunk),), needed)

    def bounded(routes: ChunkRoutes) -> jax.Array:
        send = lambda bound: send_bounded(weight, routes, partition, axis_name, bound, no_grad_row)  # noqa: E731
        return choose(send, capacities(chunk), _the_most_of_all(routes.counts.max(), axis_name))

    def ragged(routes: ChunkRoutes) -> jax.Array:
        take = take_widened if transposable else functools.partial(take_rows, no_grad_row=None)
        send = lambda bound: send_ragged(take, weight, routes, partition, axis_name, bound, no_grad_row)  # noqa: E731
        return choose(send, (-(-chunk * w // 2),), _the_most_of_all(routes.counts.sum(axis=0).max(), axis_name))

    # XLA has no ragged_all_to_all for CPUs.
    on_cpu = bounded if transposable else in_blocks
    elsewhere = ragged if options.exchange == "routed" else lambda _: dense()
    return jax.lax.platform_dependent(routes, cpu=on_cpu, default=elsewhere)


def _the_most_of_all(count: jax.Array, axis_name: str) -> jax.Array:
    """The largest of the devices' counts and of a vmap's, so that all take the same branch; they agree over the axis."""
    others = tuple(jax.typeof(count).manual_axis_type.varying - {axis_name})
    return _the_most_of_a_batch(jax.lax.pmax(count, others) if others else count)


@jax.custom_batching.custom_vmap
def _the_most_of_a_batch(count: jax.Array) -> jax.Array:
    return count


@_the_most_of_a_batch.def_vmap
def _(_size: int, _batched: Any, counts: jax.Array) -> tuple[jax.Array, bool]:
    return _the_most_of_a_batch(counts.max(axis=0)), False


def _exchange(options: ReductionOptions, weight: jax.Array, ids: jax.Array) -> str:
    row_bytes = weight.shape[1] * weight.dtype.itemsize
    return choose_exchange(options.exchange, ids.size, row_bytes)
