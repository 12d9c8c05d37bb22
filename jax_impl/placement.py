"""Which mesh a table lies on, and how ids lie on it."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

__all__ = ["map_over", "resolve_mesh"]


def resolve_mesh(mesh: Mesh | AbstractMesh | None, axis_name: str) -> Mesh | AbstractMesh:
    """``mesh``, or the one set with ``jax.set_mesh``, once it is known to have the axis ``axis_name``.

    Raises:
        TypeError: ``mesh`` is not a mesh, or ``axis_name`` is not a string.
        ValueError: there is no mesh, or it has no such axis.
    """
    if mesh is None:
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError:  # inside jit there is only the shape of the mesh
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


def map_over(mesh: Mesh | AbstractMesh, axis_name: str, ids: Any) -> tuple[Any, frozenset[str], PartitionSpec]:
    """What the layer's shard_map needs: its mesh (None: the one in force), its manual axes and the ids' specification.

    The layer takes over its own axis and every Explicit one, over which the ids stay as they are split; Auto axes are the
    compiler's. Every rank of ``axis_name`` gets all the ids.

    Raises:
        ValueError: ``axis_name`` is taken already, by a shard_map of the caller's.
    """
    in_force = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) if in_force.empty else set(in_force.axis_names) - set(in_force.manual_axes)
    if axis_name not in free:
        raise ValueError(
            f"the layer opens a shard_map of its own over {axis_name!r}, which is manual already; "
            f"inside your own shard_map call jax_impl.functional.partial_lookup"
        )
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    manual = frozenset(explicit & free | {axis_name})
    kept: list[tuple[str, ...] | None] = []
    for entry in jax.typeof(ids).sharding.spec:
        names = entry if isinstance(entry, tuple) else (entry,)
        kept.append(tuple(name for name in names if name in manual - {axis_name}) or None)
    return mesh if free == set(mesh.axis_names) else None, manual, PartitionSpec(*kept)
