"""Ids and targets as the layer computes with them, and the checks of those outside the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

from shared.checks import ids_type_error, invalid_id_error
from shared.head import check_targets_valid, invalid_target_error, targets_type_error
from shared.ids import check_ids_valid, widen
from shared.partition import VocabPartition

__all__ = [
    "IGNORED",
    "INVALID",
    "as_ids",
    "as_targets",
    "check_ids",
    "check_size_for_int32",
    "check_targets",
    "checked_array",
]


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
        check_ids_valid(_on_host(ids), vocab_size)
        return
    checked_array(ids)
    ids = _whole(ids)
    known = widen(as_ids(ids, vocab_size))
    message = str(invalid_id_error(0, range(ids.ndim), vocab_size))
    _check_traced(checkify.check, ids, (known < 0) | (known >= vocab_size), "ids", message)


def check_targets(targets: Any, vocab_size: int, ignore_index: int) -> None:
    """Refuse targets outside ``[0, vocab_size)`` that are not ignored, where they are known or ``checkify`` is applied.

    Raises:
        IndexError: naming the first such target in row-major order, its position and the legal range.
        TypeError: targets are not an array of integers.
    """
    known = as_targets(targets, vocab_size, ignore_index)
    if not isinstance(targets, jax.core.Tracer):
        check_targets_valid(_on_host(targets), vocab_size, ignore_index)  # known is traced if this runs inside jit
        return
    message = str(invalid_target_error(0, range(targets.ndim), vocab_size, ignore_index))
    _check_traced(checkify.debug_check, _whole(targets), _whole(known) == INVALID, "targets", message)


def _on_host(ids: Any) -> np.ndarray:
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        assert isinstance(ids.sharding, NamedSharding)
        ids = jax.device_put(ids, NamedSharding(ids.sharding.mesh, PartitionSpec()))
    return np.asarray(ids)


def _whole(ids: Any) -> Any:
    """Traced ids split over no Explicit axis."""
    split = jax.typeof(ids).sharding
    if any(entry is not None for entry in split.spec):
        return jax.sharding.reshard(ids, NamedSharding(split.mesh, PartitionSpec(*[None] * ids.ndim)))
    return ids


def _check_traced(check: Any, ids: Any, bad: Any, name: str, message: str) -> None:
    """Have checkify report the first bad id; ``message`` is what to say of an id of 0."""
    if ids.size == 0:
        return
    first = jnp.argmax(bad.ravel())
    position = jnp.unravel_index(first, ids.shape)
    names: dict[str, Any] = {f"i{n}": index for n, index in enumerate(position)}
    _, _, rule = message.partition(" = 0 ")
    where = f"{name}[{', '.join('{' + each + '}' for each in names)}]" if names else name
    check(~bad.ravel()[first], f"{where} = {{value}} {rule}", value=ids.ravel()[first], **names)


def checked_array(ids: Any) -> Any:
    """The array itself, once it is known to hold integers."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ids_type_error(f"dtype {ids.dtype}", "an array")
    return ids


IGNORED, INVALID = -1, -2
"""What ``as_targets`` makes of targets that are no ids."""


def as_targets(targets: Any, vocab_size: int, ignore_index: int) -> Any:
    """Targets as int32: ids of the vocabulary as they are, ``IGNORED`` for ``ignore_index``, ``INVALID`` for all others.

    Args:
        targets: a JAX array, a NumPy array or a number, of any integer dtype.
        vocab_size: rows of the whole table.
        ignore_index: any integer.

    Returns:
        int32 of the same shape, from JAX where the targets are.

    Raises:
        TypeError: targets are not an array of integers.
    """
    if isinstance(targets, jax.Array):
        namespace: Any = jnp
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise targets_type_error(f"dtype {targets.dtype}", "an array")
    else:
        namespace = np
        if not isinstance(targets, (np.ndarray, np.generic, int)) or isinstance(targets, bool):
            raise targets_type_error(type(targets).__name__, "a JAX or NumPy array")
        targets = np.asarray(targets)
        if not np.issubdtype(targets.dtype, np.integer):
            raise targets_type_error(f"dtype {targets.dtype}", "an array")
    limits = np.iinfo(targets.dtype)
    x64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
    with jax.enable_x64(x64 or targets.dtype.itemsize == 8):  # else JAX narrows 64-bit targets
        wide = widen(targets)
        known = namespace.where((wide >= 0) & (wide < vocab_size), wide, INVALID)
        if limits.min <= ignore_index <= limits.max:
            known = namespace.where(targets == targets.dtype.type(ignore_index), IGNORED, known)
        return known.astype(np.int32)
