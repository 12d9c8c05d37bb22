"""Rows of a table by their number, and the gradient: the sum of each row's occurrences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["as_integers", "take_bits", "take_rows", "take_zero_filled", "widened"]


def take_zero_filled(weight: jax.Array, local: jax.Array) -> jax.Array:
    """Row ``local`` of ``weight`` where there is such a row, zeros elsewhere."""
    # Neither jnp.take nor plain indexing: they wrap negative indices, and give NaN or another row past the end.
    return weight.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def widened(rows: jax.Array) -> jax.Array:
    """16-bit numbers as float32, others as they are.

    Where reverse mode transposes this, gradients are added up in float32, across devices too, and rounded once. The cast
    of the whole table is only ever computed in forward mode.
    """
    return rows.astype(jnp.float32) if rows.dtype.itemsize < 4 else rows


def take_bits(weight: jax.Array, local: jax.Array) -> jax.Array:
    """The same rows as unsigned integers, which nothing rounds, flushes or makes another NaN of.

    The rows are converted, not the table, which XLA would copy for it; and before zeros are filled in, for on a CPU it
    selects among 16-bit floats as float32.
    """
    bits = as_integers(weight.at[jnp.clip(local, 0, weight.shape[0] - 1)].get(mode="promise_in_bounds"))
    return jnp.where(((local >= 0) & (local < weight.shape[0]))[..., None], bits, jnp.zeros((), bits.dtype))


def as_integers(rows: jax.Array) -> jax.Array:
    """The same bits as unsigned integers."""
    return jax.lax.bitcast_convert_type(rows, {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[rows.dtype.itemsize])


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
    return jax.lax.bitcast_convert_type(take_bits(weight, local), weight.dtype)


@take_rows.defjvp
def _take_rows_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weight, local, no_grad_row = primals
    counted = local if no_grad_row is None else jnp.where(local == no_grad_row, -1, local)
    tangent = take_zero_filled(widened(tangents[0]), counted).astype(weight.dtype)
    return take_rows(weight, local, no_grad_row), tangent
