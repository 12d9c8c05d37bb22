"""What JAX has no stable public name for: why it is used, and which versions call it what.

A test uses each of them, so that a release that moves one fails loudly.

- ``typeof(x).manual_axis_type.varying`` (jax 0.10 on; ``.vma`` before): over which mesh axes an array differs inside a
  shard_map. ``jax.lax.pcast`` needs the axes that are missing, and ids must not differ over the table's axis. No public
  name is proposed.
"""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["varying_axes"]


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes, manual in the shard_map around, over which the array differs."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)
