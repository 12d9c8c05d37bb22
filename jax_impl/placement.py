"""Mesh of a table, and sharding of arrays over it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shared.config import EmbeddingConfig
from shared.sequence import chunk_shape, resolve_seq_dim

__all__ = [
    "MeshValues",
    "axes_of",
    "check_own_ids",
    "check_sequence",
    "describe_mesh",
    "explicit_axes",
    "find_mesh",
    "first_row",
    "free_axes",
    "guess_split",
    "known_split",
    "lay_out",
    "likely_split",
    "resolve_mesh",
    "restricted",
    "split_further",
    "without",
]

MeshValues = tuple[str, np.ndarray, tuple[str, ...], tuple[AxisType, ...]]
"""A mesh as plain values: platform, device ids, names and types of the axes."""


def resolve_mesh(mesh: Mesh | AbstractMesh | None, axis_name: str) -> Mesh | AbstractMesh:
    """Default to the mesh set with ``jax.set_mesh``; validate ``axis_name``.

    Raises:
        TypeError: ``mesh`` is not a mesh, or ``axis_name`` is not a string.
        ValueError: there is no mesh, or it has no such axis.
    """
    if mesh is None:
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:  # inside jit only the abstract mesh is known
            mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError('mesh is missing: pass mesh=jax.make_mesh((w,), ("tp",)), or set one with jax.set_mesh')
    elif not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {mesh!r}")
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be a string, the name of one mesh axis, got {axis_name!r}")
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be an axis of the mesh, one of {tuple(mesh.axis_names)}, got {axis_name!r}")
    return mesh


def describe_mesh(mesh: Mesh) -> MeshValues:
    """Convert a mesh to plain values for ``find_mesh`` in another process."""
    ids = np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
    return mesh.devices.flat[0].platform, ids, mesh.axis_names, mesh.axis_types


def find_mesh(described: MeshValues) -> Mesh:
    """Build a mesh of this process's devices from ``describe_mesh``'s result.

    Raises:
        ValueError: this process lacks one of the devices.
    """
    platform, ids, names, types = described
    try:
        devices = {device.id: device for device in jax.local_devices(backend=platform)}
    except RuntimeError:  # no such backend
        devices = {}
    if missing := sorted(set(ids.ravel().tolist()) - set(devices)):
        raise ValueError(
            f"this process must have the {ids.size} {platform} devices that the layer was pickled on, and lacks those "
            f"with ids {missing}: between machines, use emb.save_table and ParallelVocabEmbedding.from_table, or Orbax"
        )
    return Mesh(np.vectorize(devices.get, otypes=[object])(ids), names, axis_types=types)


def first_row(index: Any) -> int:
    """First row of a table's shard, given the shard's index."""
    return index[0].start or 0


def free_axes(mesh: Mesh | AbstractMesh, axis_name: str) -> frozenset[str]:
    """Mesh axes that no enclosing shard_map makes manual.

    Raises:
        ValueError: ``axis_name`` is manual already, or another mesh is set with ``jax.set_mesh``.
    """
    in_force = jax.sharding.get_abstract_mesh()
    free = frozenset(mesh.axis_names)
    if not in_force.empty:
        if dict(in_force.shape) != dict(mesh.shape):
            raise ValueError(
                f"the mesh that is set must be the layer's, {dict(mesh.shape)}, got {dict(in_force.shape)}: call the layer "
                f"under jax.set_mesh(emb.mesh), or without a mesh set"
            )
        free -= frozenset(in_force.manual_axes)
    if axis_name not in free:
        raise ValueError(
            f"the layer opens a shard_map of its own over {axis_name!r}, which is manual already; "
            f"inside your own shard_map call jax_impl.functional.partial_lookup or reduced_lookup"
        )
    return free


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Explicit axes of the mesh; array types include the split over these."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Explicit)


def known_split(ids: jax.Array | np.ndarray, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Known split of ids over the mesh; inside jit, Explicit axes only."""
    if isinstance(ids, jax.core.Tracer):
        return restricted(jax.typeof(ids).sharding.spec, explicit_axes(mesh))
    if isinstance(ids, jax.Array) and isinstance(ids.sharding, NamedSharding) and ids.sharding.mesh == mesh:
        return ids.sharding.spec
    return PartitionSpec()


def likely_split(
    ids: jax.Array, split: PartitionSpec, mesh: Mesh | AbstractMesh, axis_name: str, config: EmbeddingConfig
) -> PartitionSpec:
    """Guess that free Auto axes split the batch of traced ids.

    Known axes stay. The batch is the first dimension other than ``seq_dim``. A wrong guess costs a collective, not
    correctness. Without a guess, XLA gathers the tokens of all devices before a scatter or a reduce_scatter.
    """
    if not isinstance(ids, jax.core.Tracer):
        return split
    has_sequence = (ids.ndim > 1 or config.reduction == "reduce_scatter") and config.reduction != "all_to_all"
    sequence = config.seq_dim % ids.ndim if ids.ndim and has_sequence else None
    shape = ids.shape
    if config.reduction == "all_to_all" and axis_name not in axes_of(split):  # it splits the batch too
        shape = (shape[0] // mesh.shape[axis_name], *shape[1:])
    return guess_split(shape, split, mesh, axis_name, sequence)


def guess_split(
    shape: tuple[int, ...], split: PartitionSpec, mesh: Mesh | AbstractMesh, axis_name: str, sequence: int | None
) -> PartitionSpec:
    """Split the first dimension other than ``sequence`` over free Auto axes too."""
    batch = next((dim for dim in range(len(shape)) if dim != sequence), None)
    if batch is None:
        return split
    entries = [*split, *[None] * (len(shape) - len(split))]
    names, size = _names(entries[batch]), shape[batch]
    for name in names:
        size //= mesh.shape[name]
    free = free_axes(mesh, axis_name) - axes_of(split) - explicit_axes(mesh) - {axis_name}
    for name in mesh.axis_names:
        if name in free and size % mesh.shape[name] == 0:
            names, size = (*names, name), size // mesh.shape[name]
    entries[batch] = names or None
    return PartitionSpec(*entries)


def axes_of(spec: PartitionSpec) -> frozenset[str]:
    """Mesh axes that a spec names."""
    return frozenset(name for entry in spec for name in _names(entry))


def split_further(spec: PartitionSpec, ndim: int, dim: int, axis_name: str) -> PartitionSpec:
    """Extend a spec to ``ndim + 1`` entries; add ``axis_name`` to ``dim``."""
    entries = [*spec, *[None] * (ndim + 1 - len(spec))]
    place = resolve_seq_dim(ndim, dim)
    entries[place] = (*_names(entries[place]), axis_name)
    return PartitionSpec(*entries)


def check_sequence(
    shape: tuple[int, ...], seq_dim: int, axis_name: str, split: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    """Validate that the sequence is divisible by the sizes of its axes."""
    dim = resolve_seq_dim(len(shape), seq_dim)
    before = _names(split[dim]) if dim < len(split) else ()
    ranks = mesh.shape[axis_name]
    for name in set(before) - {axis_name}:
        ranks *= mesh.shape[name]
    chunk_shape(shape, seq_dim, ranks)


def check_own_ids(shape: tuple[int, ...], axis_name: str, split: PartitionSpec, mesh: Mesh | AbstractMesh) -> None:
    """Validate that dimension 0 is divisible by the sizes of its axes."""
    names = {axis_name, *(_names(split[0]) if len(split) else ())}
    ranks = math.prod(mesh.shape[name] for name in names)
    if not shape or shape[0] % ranks:
        raise ValueError(
            f"with reduction='all_to_all' the first dimension of the ids must be divisible by the {ranks} ranks along "
            f"{', '.join(sorted(names))}, got ids of shape {shape}: pad the batch, with -1 for instance"
        )


def lay_out(array: jax.Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> jax.Array:
    """Reshard over Explicit axes as ``spec`` says; leave Auto axes to XLA."""
    visible = restricted(spec, explicit_axes(mesh))
    if jax.typeof(array).sharding.spec == visible:
        return array
    in_force = jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(array, NamedSharding(mesh, visible) if in_force.empty else visible)


def restricted(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """Restrict a spec to ``axes``."""
    kept: list[str | tuple[str, ...] | None] = []
    for entry in spec:
        names = tuple(name for name in _names(entry) if name in axes)
        kept.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*kept)


def without(spec: PartitionSpec, axis_name: str) -> PartitionSpec:
    """Remove one axis from a spec."""
    return restricted(spec, axes_of(spec) - {axis_name})


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
