"""Initial values of a table."""

import functools
from typing import Any, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_impl.placement import first_row
from shared.config import EmbeddingConfig
from shared.global_normal import normal_rows

__all__ = ["draw_table", "zero_rows"]


def draw_table(
    config: EmbeddingConfig,
    mesh: Mesh | AbstractMesh,
    axis_name: str,
    dtype: np.dtype[Any],
    key: jax.Array | None = None,
) -> jax.Array:
    """Draw a table; padding rows and the ``padding_idx`` row are zero.

    Args:
        config: options; ``init``, ``init_*`` and ``padding_idx`` as for ``ParallelVocabEmbedding``.
        mesh, axis_name: the mesh, and the axis that splits the rows.
        dtype: of the table.
        key: replaces the seed of ``"per_rank"``: rank r draws from ``jax.random.fold_in(key, r)``.

    Returns:
        ``[padded_vocab_size, emb_size]``, rows split over ``axis_name``.

    Raises:
        ValueError: a callable ``init`` returned another shape than one row for each row number.
    """
    if config.init is None or callable(config.init):
        rows = _ask_for_rows(config, mesh, axis_name, dtype)
    elif config.init == "global":
        rows = _draw_globally(config, mesh, axis_name, dtype)
    else:
        if key is None:
            keys = [jax.random.key(config.init_base_seed + rank) for rank in range(config.world_size)]
        else:
            keys = [jax.random.fold_in(key, rank) for rank in range(config.world_size)]
        rows = _draw_on_each_rank(jnp.stack(keys), config, mesh, axis_name, dtype)
        # Outside jit these do not fuse: fused, the product would not be rounded before the sum.
        rows = config.init_std * rows
        rows = config.init_mean + rows
    if config.padding_idx is not None or config.partition.padding_rows:
        rows = _zero_rows_in_place(rows, config, mesh, axis_name)
    return rows


def _ask_for_rows(
    config: EmbeddingConfig, mesh: Mesh | AbstractMesh, axis_name: str, dtype: np.dtype[Any]
) -> jax.Array:
    partition, shape = config.partition, (config.partition.rows_per_rank, config.emb_size)

    def on_each_rank() -> jax.Array:
        if config.init is None:
            return jnp.zeros(shape, dtype)
        row = partition.start(jax.lax.axis_index(axis_name)) + jnp.arange(shape[0], dtype=jnp.int32)
        rows = jnp.asarray(config.init(jnp.minimum(row, partition.vocab_size - 1)))
        if rows.shape != shape:
            raise ValueError(
                f"init must return a row for each of the row numbers that it is given, {list(shape)}, got {list(rows.shape)}"
            )
        return rows.astype(dtype)

    return jax.jit(jax.shard_map(on_each_rank, mesh=mesh, in_specs=(), out_specs=PartitionSpec(axis_name, None)))()


def _draw_globally(
    config: EmbeddingConfig, mesh: Mesh | AbstractMesh, axis_name: str, dtype: np.dtype[Any]
) -> jax.Array:
    n = config.partition.rows_per_rank

    def rows_of(rank: SupportsInt) -> np.ndarray:
        start, stop = config.partition.owned_range(int(rank))
        rows = np.zeros((n, config.emb_size), dtype)
        mean, std = config.init_mean, config.init_std
        normal_rows(start, stop, config.emb_size, dtype, config.init_base_seed, mean, std, out=rows[: stop - start])
        return rows

    split = PartitionSpec(axis_name, None)
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    if isinstance(mesh, Mesh) and not traced:
        size, sharding = (config.padded_vocab_size, config.emb_size), NamedSharding(mesh, split)
        return jax.make_array_from_callback(size, sharding, lambda index: rows_of(first_row(index) // n))

    def on_each_rank() -> jax.Array:
        # While tracing: the host draws them when the program runs.
        rank = jax.lax.axis_index(axis_name)
        return jax.pure_callback(rows_of, jax.ShapeDtypeStruct((n, config.emb_size), dtype), rank)

    return jax.jit(jax.shard_map(on_each_rank, mesh=mesh, in_specs=(), out_specs=split))()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw_on_each_rank(
    keys: jax.Array, config: EmbeddingConfig, mesh: Mesh | AbstractMesh, axis_name: str, dtype: np.dtype[Any]
) -> jax.Array:
    """Standard normal rows; rank r draws from ``keys[r]``."""

    def on_each_rank(keys: jax.Array) -> jax.Array:
        key = keys[jax.lax.axis_index(axis_name)]
        return jax.random.normal(key, (config.partition.rows_per_rank, config.emb_size), dtype)

    split = PartitionSpec(axis_name, None)
    return jax.shard_map(on_each_rank, mesh=mesh, in_specs=PartitionSpec(), out_specs=split)(keys)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def zero_rows(weight: jax.Array, config: EmbeddingConfig, mesh: Mesh | AbstractMesh, axis_name: str) -> jax.Array:
    """Set padding rows and the row of ``padding_idx`` to zero."""
    partition = config.partition

    def on_each_rank(rows: jax.Array) -> jax.Array:
        row = partition.start(jax.lax.axis_index(axis_name)) + jnp.arange(partition.rows_per_rank, dtype=jnp.int32)
        kept = row < partition.vocab_size
        if config.padding_idx is not None:
            kept &= row != config.padding_idx
        return jnp.where(kept[:, None], rows, jnp.zeros((), rows.dtype))

    split = PartitionSpec(axis_name, None)
    return jax.shard_map(on_each_rank, mesh=mesh, in_specs=split, out_specs=split)(weight)


_zero_rows_in_place = jax.jit(zero_rows, static_argnums=(1, 2, 3), donate_argnums=0)
