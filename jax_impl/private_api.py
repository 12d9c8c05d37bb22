"""Private JAX APIs, and differences between JAX versions from 0.8.2 on.

A test uses each one and fails when a release moves it.

- ``typeof(x).manual_axis_type.varying`` (``.vma`` before jax 0.10): mesh axes over which an array varies inside a shard_map.
  ``jax.lax.pcast`` takes only the missing ones, and ids must not vary over the table's axis. No public name is proposed.
- ``jax._src.lax.parallel.all_gather_invariant``, before jax 0.10 only: later ``jax.lax.all_gather(to="invarying")``. Remove
  it together with support for jax 0.9.
"""

from typing import Any

import jax
from jax.typing import ArrayLike

__all__ = ["all_gather_invarying", "varying_axes"]


def varying_axes(array: ArrayLike) -> frozenset[str]:
    """Manual mesh axes over which the array varies."""
    aval: Any = jax.typeof(array)
    return frozenset(aval.manual_axis_type.varying if jax.__version_info__ >= (0, 10) else aval.vma)


def all_gather_invarying(array: jax.Array, axis_name: str, *, axis: int = 0, tiled: bool = True) -> jax.Array:
    """All-gather rows into an array that does not vary over the axis."""
    if jax.__version_info__ >= (0, 10):
        return jax.lax.all_gather(array, axis_name, axis=axis, tiled=tiled, to="invarying")
    from jax._src.lax import parallel

    gather: Any = parallel.all_gather_invariant
    return gather(array, axis_name, axis=axis, tiled=tiled)
