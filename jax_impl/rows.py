"""Rows of a table by their number, and the gradient: the sum of each row's occurrences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["take_rows"]


def _take(weight: jax.Array, local: jax.Array) -> jax.Array:
    # Neither jnp.take nor plain indexing: they wrap negative indices, and give NaN or another row past the end.
    return weight.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_jvp
def take_rows(weight: jax.Array, local: jax.Array, no_grad_row: jax.Array | None) -> jax.Array:
    """Row ``local`` of ``weight`` where there is such a row, +0.0 elsewhere; row ``no_grad_row`` gets no gradient.

    Args:
        weight: the table, ``[n, e]``.
        local: row numbers, of any shape.
        no_grad_row: a row number, or None.

    Returns:
        ``[*local.shape, e]``.
    """
    if weight.dtype == jnp.bfloat16:
        # As integers, or XLA selects in float32 on a CPU, which makes other NaN of NaN.
        bits = _take(jax.lax.bitcast_convert_type(weight, jnp.uint16), local)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return _take(weight, local)


@take_rows.defjvp
def _take_rows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weight, local, no_grad_row = primals
    weight_dot = tangents[0]
    # Reverse mode transposes these lines: 16-bit gradients are then added up in float32, across devices too, and rounded
    # once. The cast of the whole table is only ever computed in forward mode.
    if weight.dtype.itemsize < 4:
        weight_dot = weight_dot.astype(jnp.float32)
    counted = local if no_grad_row is None else jnp.where(local == no_grad_row, -1, local)
    return take_rows(weight, local, no_grad_row), _take(weight_dot, counted).astype(weight.dtype)
