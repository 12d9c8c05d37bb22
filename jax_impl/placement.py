"""Which mesh a table lies on, and how ids lie on it."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

__all__ = ["explicit_spec", "manual_axes", "resolve_mesh"]


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


def manual_axes(mesh: Mesh | AbstractMesh, axis_name: str) -> frozenset[str]:
    """The axes that the layer's shard_map takes over: its own and every Explicit one; Auto ones stay the compiler's.

    Raises:
        ValueError: ``axis_name`` is already manual, inside a shard_map of the caller's.
    """
    taken = set(jax.sharding.get_abstract_mesh().manual_axes)
    if axis_name in taken:
        raise ValueError(
            f"the layer opens its own shard_map over {axis_name!r}, which is already manual here; "
            f"inside your own shard_map call jax_impl.functional.partial_lookup"
        )
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    return frozenset((explicit | {axis_name}) - taken)


def explicit_spec(ids: Any, manual: frozenset[str], axis_name: str) -> PartitionSpec:
    """How the ids are split over the ``manual`` axes, as their type says; every rank of ``axis_name`` gets them whole."""

    def kept(entry: Any) -> Any:
        names = [n for n in (entry if isinstance(entry, tuple) else (entry,)) if n in manual and n != axis_name]
        return tuple(names) or None

    return PartitionSpec(*map(kept, jax.typeof(ids).sharding.spec))
