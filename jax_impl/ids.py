"""Ids as the layer computes with them, and the check of ``invalid_ids="error"``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

from shared.checks import ids_type_error, invalid_id_error
from shared.ids import check_ids_valid, widen
from shared.partition import VocabPartition

__all__ = ["as_ids", "check_ids", "check_size_for_int32", "checked_array"]


def as_ids(ids: Any, vocab_size: int) -> Any:
    """Ids as an array that JAX takes without narrowing: those of NumPy are range-checked before they become int32.

    A 64-bit id that is no id of the vocabulary becomes -1, never another id. ``jax.jit`` narrows NumPy arguments at its
    door, before any code of the function runs: call this on 64-bit NumPy ids that go into a jitted function of your own.

    Args:
        ids: a JAX array, a NumPy array or a number, of any integer dtype.
        vocab_size: rows of the whole table, at most ``2**31 - 1``.

    Returns:
        int32 of the same shape, from JAX where the ids are.

    Raises:
        TypeError: ids are not an array of integers.

    Example:
        >>> import numpy as np
        >>> from jax_impl import as_ids
        >>> as_ids(np.array([7, 2**32 + 7]), vocab_size=10)
        array([ 7, -1], dtype=int32)
    """
    if isinstance(ids, jax.Array):
        checked_array(ids)
        if ids.dtype.itemsize < 8:
            return widen(ids)
        with jax.enable_x64(True):  # without it, JAX narrows at the first operation
            return jnp.where((ids >= 0) & (ids < vocab_size), ids, -1).astype(jnp.int32)
    if not isinstance(ids, (np.ndarray, np.generic, int)) or isinstance(ids, bool):
        raise ids_type_error(type(ids).__name__, "a JAX or NumPy array")
    wide = widen(np.asarray(ids))
    return np.where((wide >= 0) & (wide < vocab_size), wide, -1).astype(np.int32)


def check_size_for_int32(partition: VocabPartition) -> None:
    """Refuse a vocabulary whose rows, and one more for foreign ids, int32 cannot number.

    Raises:
        ValueError: naming the size.
    """
    size, limit = partition.padded_vocab_size, "2**31" if partition.world_size > 1 else "2**31 - 1"
    if size >= 2**31 or partition.rows_per_rank >= 2**31 - 1:
        raise ValueError(f"vocab_size must fit JAX's int32 indices, below {limit}, got {size}")


def check_ids(ids: Any, vocab_size: int) -> None:
    """Refuse ids outside ``[0, vocab_size)``: at once where they are known, with ``checkify`` where they are traced.

    Raises:
        IndexError: naming the first such id in row-major order, its position and the legal range.
        TypeError: ids are not an array of integers.
    """
    if not isinstance(ids, jax.core.Tracer):
        as_ids(ids, vocab_size)
        if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
            assert isinstance(ids.sharding, NamedSharding)
            ids = jax.device_put(ids, NamedSharding(ids.sharding.mesh, PartitionSpec()))
        check_ids_valid(np.asarray(ids), vocab_size)
        return
    checked_array(ids)
    if ids.size == 0:
        return
    split = jax.typeof(ids).sharding
    if any(entry is not None for entry in split.spec):
        ids = jax.sharding.reshard(ids, NamedSharding(split.mesh, PartitionSpec(*[None] * ids.ndim)))
    known = widen(as_ids(ids, vocab_size))
    bad = ((known < 0) | (known >= vocab_size)).ravel()
    first = jnp.argmax(bad)
    position = jnp.unravel_index(first, ids.shape)
    names: dict[str, Any] = {f"i{n}": index for n, index in enumerate(position)}
    message = str(invalid_id_error(0, range(ids.ndim), vocab_size))
    _, _, rule = message.partition(" = 0 ")
    where = f"ids[{', '.join('{' + name + '}' for name in names)}]" if names else "ids"
    checkify.check(~bad[first], f"{where} = {{value}} {rule}", value=ids.ravel()[first], **names)


def checked_array(ids: Any) -> Any:
    """The array itself, once it is known to hold integers."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ids_type_error(f"dtype {ids.dtype}", "an array")
    return ids
