"""The numbers that a table begins with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_impl.placement import first_row
from shared.global_normal import normal_rows
from shared.partition import VocabPartition

__all__ = ["draw_normal"]


def draw_normal(
    partition: VocabPartition,
    emb_size: int,
    mesh: Mesh | AbstractMesh,
    axis_name: str,
    dtype: np.dtype[Any],
    init: str,
    mean: float,
    std: float,
    seed: int,
    padding_idx: int | None,
) -> jax.Array:
    """A table of normally distributed numbers, its rows split over ``axis_name``; rows of padding are zero.

    Args:
        partition: who owns what.
        emb_size: columns.
        mesh, axis_name: where the table lies.
        dtype: of the table.
        init: ``"per_rank"``: rank r's rows come from ``jax.random.key(seed + r)``; ``"global"``: row i depends on the seed
            and i alone (``shared.global_normal``), computed on the host, by each process for its own devices.
        mean, std: of the distribution.
        seed: what the numbers depend on.
        padding_idx: a global id whose row is zero, or None.

    Returns:
        ``[partition.padded_vocab_size, emb_size]``.
    """
    if init == "global":
        rows = _draw_globally(partition, emb_size, mesh, axis_name, dtype, mean, std, seed)
    else:
        keys = [jax.random.key(seed + rank) for rank in range(partition.world_size)]
        rows = _draw_on_each_rank(jnp.stack(keys), partition, emb_size, mesh, axis_name, dtype)
        # Outside jit each line is a computation of its own: fused, the multiplication would not round before the addition.
        rows = std * rows
        rows = mean + rows
    if padding_idx is not None or partition.padding_rows:
        rows = _zero_rows(rows, padding_idx, partition, mesh, axis_name)
    return rows


def _draw_globally(
    partition: VocabPartition,
    emb_size: int,
    mesh: Mesh | AbstractMesh,
    axis_name: str,
    dtype: np.dtype[Any],
    mean: float,
    std: float,
    seed: int,
) -> jax.Array:
    n, shape = partition.rows_per_rank, (partition.rows_per_rank, emb_size)

    def rows_of(rank: Any) -> np.ndarray:
        start, stop = partition.owned_range(int(rank))
        rows = np.zeros(shape, dtype)
        normal_rows(start, stop, emb_size, dtype, seed, mean, std, out=rows[: stop - start])
        return rows

    split = PartitionSpec(axis_name, None)
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    if isinstance(mesh, Mesh) and not traced:
        sharding = NamedSharding(mesh, split)
        size = (partition.padded_vocab_size, emb_size)
        return jax.make_array_from_callback(size, sharding, lambda index: rows_of(first_row(index) // n))

    def on_each_rank() -> jax.Array:
        # Traced, the numbers are asked of the host when the program runs.
        rank = jax.lax.axis_index(axis_name)
        return jax.pure_callback(rows_of, jax.ShapeDtypeStruct(shape, dtype), rank)

    return jax.jit(jax.shard_map(on_each_rank, mesh=mesh, in_specs=(), out_specs=split))()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw_on_each_rank(
    keys: jax.Array,
    partition: VocabPartition,
    emb_size: int,
    mesh: Mesh | AbstractMesh,
    axis_name: str,
    dtype: np.dtype[Any],
) -> jax.Array:
    """``[v, e]`` standard normal numbers, each rank's from its own of the ``[w]`` keys."""

    def on_each_rank(keys: jax.Array) -> jax.Array:
        key = keys[jax.lax.axis_index(axis_name)]
        return jax.random.normal(key, (partition.rows_per_rank, emb_size), dtype)

    split = PartitionSpec(axis_name, None)
    return jax.shard_map(on_each_rank, mesh=mesh, in_specs=PartitionSpec(), out_specs=split)(keys)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), donate_argnums=0)
def _zero_rows(
    weight: jax.Array, index: int | None, partition: VocabPartition, mesh: Mesh | AbstractMesh, axis_name: str
) -> jax.Array:
    """The table with zeros in the rows of padding, and in row ``index``."""

    def on_each_rank(rows: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(axis_name)
        if partition.padding_rows:
            row = partition.start(rank) + jnp.arange(partition.rows_per_rank, dtype=jnp.int32)
            rows = jnp.where((row < partition.vocab_size)[:, None], rows, jnp.zeros((), rows.dtype))
        if index is not None:
            rows = rows.at[partition.local_ids(index, rank)].set(0, mode="drop", wrap_negative_indices=False)
        return rows

    split = PartitionSpec(axis_name, None)
    return jax.shard_map(on_each_rank, mesh=mesh, in_specs=split, out_specs=split)(weight)
