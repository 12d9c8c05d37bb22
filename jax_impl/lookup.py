"""Rows of a table by their number, and the gradient: the sum of each row's occurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["as_integers", "take_bits", "take_rows", "take_widened", "take_zero_filled"]


def take_zero_filled(weight: jax.Array, local: jax.Array) -> jax.Array:
    """Row ``local`` of ``weight`` where there is such a row, zeros elsewhere."""
    # Neither jnp.take nor plain indexing: they wrap negative indices, and give NaN or another row past the end.
    return weight.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def take_widened(weight: jax.Array, local: jax.Array) -> jax.Array:
    """The same rows, 16-bit ones as float32: what reverse mode transposes adds up in float32, and rounds once.

    Few gradients are added up by themselves, and then written to their rows as they are. Many, and those that devices have
    to add up between them, are added up in a float32 copy of the table's rows.
    """
    if weight.dtype.itemsize >= 4:
        return take_zero_filled(weight, local)
    if 0 < 2 * local.size < weight.shape[0] and _local_alone(weight, local):
        return _take.bind(weight, local)
    return _plain_take(weight, local)


def _local_alone(weight: jax.Array, local: jax.Array) -> bool:
    """Whether every device adds up the gradients of rows of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    varying = (jax.typeof(array).manual_axis_type.varying for array in (local, weight))
    return set(mesh.manual_axes) == set(mesh.axis_names) and next(varying) <= next(varying)


def _plain_take(weight: jax.Array, local: jax.Array) -> jax.Array:
    return take_zero_filled(weight.astype(jnp.float32), local)


def _lean_take(weight: jax.Array, local: jax.Array) -> jax.Array:
    return take_zero_filled(weight, local).astype(jnp.float32)


def _plain_sum(grad: jax.Array, local: jax.Array, *, num_rows: int, dtype: Any) -> jax.Array:
    """For each of ``num_rows`` rows the sum of its gradients."""
    empty = jnp.zeros((num_rows, grad.shape[-1]), grad.dtype)
    return empty.at[local].add(grad, mode="drop", wrap_negative_indices=False).astype(dtype)


def _sums(grad: jax.Array, local: jax.Array, num_rows: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The same in memory for the tokens, not for the table: a row's gradients are added up where its first token is.

    Returns:
        For each token the row that its sum is of, ``num_rows`` where it is not a first one; and the sum.
    """
    tokens = jnp.arange(local.size, dtype=jnp.int32)
    rows, grad = local.reshape(-1), grad.reshape(local.size, grad.shape[-1])
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    first = jnp.full(num_rows + 1, local.size, jnp.int32).at[rows].min(tokens)[rows]
    sums = jnp.zeros_like(grad).at[first].add(grad, mode="drop").astype(dtype)
    return jnp.where(first == tokens, rows, num_rows), sums


def _lean_sum(grad: jax.Array, local: jax.Array, *, num_rows: int, dtype: Any) -> jax.Array:
    rows, sums = _sums(grad, local, num_rows, dtype)
    return jnp.zeros((num_rows, grad.shape[-1]), dtype).at[rows].set(sums, mode="drop")


def _lean_sum_on_cpu(grad: jax.Array, local: jax.Array, *, num_rows: int, dtype: Any) -> jax.Array:
    """The same by integers, for there XLA makes a float32 copy of what bfloat16 is written to."""
    rows, sums = _sums(grad, local, num_rows, dtype)
    bits = as_integers(sums)
    output = jnp.zeros((num_rows, grad.shape[-1]), bits.dtype).at[rows].set(bits, mode="drop")
    return jax.lax.bitcast_convert_type(output, dtype)


def _linear(name: str, plain: Callable[..., jax.Array], lean: Callable[..., jax.Array]) -> Primitive:
    """An operation that is linear in the first of two arguments; ``lean`` computes what ``plain``, differentiable, means."""
    primitive = Primitive(name)

    def abstract(*arguments: Any, **params: Any) -> Any:
        return jax.make_jaxpr(lambda *arrays: plain(*arrays, **params))(*arguments).out_avals[0]

    def batch(arguments: Any, dims: Any, **params: Any) -> tuple[jax.Array, int]:
        return jax.vmap(lambda *arrays: plain(*arrays, **params), in_axes=dims)(*arguments), 0

    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[jax.Array, Any]:
        output = primitive.bind(*primals, **params)
        if type(tangents[0]) is ad.Zero:
            return output, ad.Zero(jax.typeof(output))
        return output, primitive.bind(tangents[0], primals[1], **params)

    primitive.def_impl(lambda *arrays, **params: jax.jit(lambda *a: primitive.bind(*a, **params))(*arrays))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(lean, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    return primitive


def _take_transpose(grad: Any, weight: Any, local: jax.Array) -> tuple[Any, None]:
    if type(grad) is ad.Zero:
        return ad.Zero(weight.aval), None
    return _sum.bind(grad, local, num_rows=weight.aval.shape[0], dtype=weight.aval.dtype), None


def _sum_transpose(grad: Any, summands: Any, local: jax.Array, *, num_rows: int, dtype: Any) -> tuple[Any, None]:
    if type(grad) is ad.Zero:
        return ad.Zero(summands.aval), None
    return _take.bind(grad, local), None


_take = _linear("pve_take_rows", _plain_take, _lean_take)
_sum = _linear("pve_sum_rows", _plain_sum, _lean_sum)
ad.primitive_transposes[_take] = _take_transpose
ad.primitive_transposes[_sum] = _sum_transpose
mlir.register_lowering(_sum, mlir.lower_fun(_lean_sum_on_cpu, multiple_results=False), platform="cpu")


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
    tangent = take_widened(tangents[0], counted).astype(weight.dtype)
    return take_rows(weight, local, no_grad_row), tangent
