"""Lookups of all ranks under one shard_map, with their derivative."""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jax_impl.exchange import linear_reduced_lookup, reduced_lookup
from jax_impl.lookup import linear_lookup, lookup
from jax_impl.placement import axes_of, explicit_axes, free_axes, lay_out, likely_split, restricted, split_further
from shared.config import EmbeddingConfig

__all__ = ["Static", "lookup_over_mesh"]


class Static(NamedTuple):
    """Static part of a layer: everything but its table."""

    config: EmbeddingConfig
    mesh: Mesh | AbstractMesh
    axis_name: str


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def lookup_over_mesh(static: Static, split: PartitionSpec, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """Look ids up; ``split`` is their known split over the mesh."""
    if static.config.reduction in ("reduce_scatter", "all_to_all"):
        split = likely_split(ids, split, static.mesh, static.axis_name, static.config)
    return _hidden_from_checkify(static, split, False, weight, ids)


@lookup_over_mesh.defjvp
def _(
    static: Static,
    split: PartitionSpec,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, Any],
) -> tuple[jax.Array, jax.Array]:
    weight, ids = primals
    likely = likely_split(ids, split, static.mesh, static.axis_name, static.config)
    tangent = _hidden_from_checkify(static, likely, True, tangents[0], ids)
    return lookup_over_mesh(static, split, weight, ids), tangent


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_each_rank(static: Static, split: PartitionSpec, linear: bool, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """Run the ranks' lookups under one shard_map; ``linear``: the map to transpose."""
    config, mesh, axis_name = static
    free = free_axes(mesh, axis_name)
    manual = free & (explicit_axes(mesh) | axes_of(split)) | {axis_name}
    rows, tokens = PartitionSpec(axis_name, None), restricted(split, manual - {axis_name})
    if config.reduction == "all_to_all":  # the ranks' own ids are concatenated along the first dimension
        tokens = PartitionSpec(*split_further(tokens, ids.ndim, 0, axis_name)[: ids.ndim])

    def on_each_rank(weight: jax.Array, ids: jax.Array) -> jax.Array:
        if config.reduction == "none":
            return (linear_lookup if linear else lookup)(weight, ids, config, axis_name)[None]
        return (linear_reduced_lookup if linear else reduced_lookup)(weight, ids, config, axis_name)

    if config.reduction == "none":
        output = PartitionSpec(axis_name, *tokens, None)
    elif config.reduction in ("all_reduce", "all_to_all"):
        output = PartitionSpec(*tokens, None)
    else:
        output = split_further(tokens, ids.ndim, config.seq_dim, axis_name)
    mapped = jax.shard_map(
        on_each_rank,
        mesh=mesh if free == set(mesh.axis_names) else None,
        in_specs=(rows, tokens),
        out_specs=output,
        axis_names=manual,
    )
    return mapped(lay_out(weight, mesh, rows), lay_out(ids, mesh, tokens))


def _hidden_from_checkify(
    static: Static, split: PartitionSpec, linear: bool, weight: jax.Array, ids: jax.Array
) -> jax.Array:
    """Run ``_on_each_rank``; where checkify may be applied, hide it in a linear_call.

    checkify rewrites every shard_map, even one without checks, and fails if a mesh is set or has further axes (jax 0.10.2).
    It does not look into linear_call, which has derivatives of any order but no vmap.
    """
    config, run = static.config, functools.partial(_on_each_rank, static, split, linear)
    if config.invalid_ids != "error" or not isinstance(ids, jax.core.Tracer):
        return run(weight, ids)

    def transpose(ids: jax.Array, cotangent: jax.Array) -> jax.Array:
        table = jax.ShapeDtypeStruct((config.padded_vocab_size, config.emb_size), cotangent.dtype)
        return jax.linear_transpose(lambda weight: run(weight, ids), table)(cotangent)[0]

    return jax.custom_derivatives.linear_call(lambda ids, weight: run(weight, ids), transpose, ids, weight)
