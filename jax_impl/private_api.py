"""What JAX has no stable public name for, and what differs between its versions: jax 0.8.2 and newer.

A test uses each of them, so that a release that moves one fails loudly.

- ``typeof(x).manual_axis_type.varying`` (jax 0.10 on; ``.vma`` before): over which mesh axes an array differs inside a
  shard_map. ``jax.lax.pcast`` needs the axes that are missing, and ids must not differ over the table's axis. No public
  name is proposed.
- ``jax._src.lax.parallel.all_gather_invariant`` (before jax 0.10 only): ``jax.lax.all_gather(to="invarying")`` has the
  public name from there on. Not needed once jax 0.9 is no longer supported.
"""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["all_gather_invarying", "varying_axes"]


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes, manual in the shard_map around, over which the array differs."""
    aval: Any = jax.typeof(array)
    return frozenset(aval.manual_axis_type.varying if jax.__version_info__ >= (0, 10) else aval.vma)


def all_gather_invarying(rows: jax.Array, axis_name: str) -> jax.Array:
    """All ranks' rows, concatenated, as an array that does not differ over the axis."""
    if jax.__version_info__ >= (0, 10):
        return jax.lax.all_gather(rows, axis_name, tiled=True, to="invarying")
    from jax._src.lax import parallel

    gather: Any = parallel.all_gather_invariant
    return gather(rows, axis_name, tiled=True)
