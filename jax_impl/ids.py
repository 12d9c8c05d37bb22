"""Ids and targets as int32, and checks for those outside the vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

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


def as_ids(ids: ArrayLike, vocab_size: int) -> jax.Array | np.ndarray:
    """Cast ids to int32; range-check 64-bit ones first.

    A 64-bit id outside the vocabulary becomes -1, never another id. ``jax.jit`` narrows 64-bit NumPy arguments before the
    function runs: call this on such ids before you pass them to a jitted function of your own.

    Args:
        ids: a JAX array, a NumPy array or a number, of any integer dtype.
        vocab_size: rows of the whole table, at most ``2**31 - 1``.

    Returns:
        int32 of the same shape: a JAX array for JAX ids, else a NumPy array.

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
        with jax.enable_x64(True):  # else JAX narrows at the first operation
            return jnp.where((ids >= 0) & (ids < vocab_size), ids, -1).astype(jnp.int32)
    if not isinstance(ids, (np.ndarray, np.generic, int)) or isinstance(ids, bool):
        raise ids_type_error(type(ids).__name__, "a JAX or NumPy array")
    wide = widen(np.asarray(ids))
    return np.where((wide >= 0) & (wide < vocab_size), wide, -1).astype(np.int32)


def check_size_for_int32(partition: VocabPartition) -> None:
    """Validate that int32 can number the rows and the foreign key."""
    size, limit = partition.padded_vocab_size, "2**31" if partition.world_size > 1 else "2**31 - 1"
    if size >= 2**31 or partition.rows_per_rank >= 2**31 - 1:
        name = "padded_vocab_size" if partition.padding_rows else "vocab_size"
        raise ValueError(f"{name} must fit JAX's int32 indices, below {limit}, got {size}")


def check_ids(ids: ArrayLike, vocab_size: int) -> None:
    """Validate that ids lie in ``[0, vocab_size)``; traced ones with ``checkify``."""
    if not isinstance(ids, jax.core.Tracer):
        as_ids(ids, vocab_size)
        check_ids_valid(_on_host(ids), vocab_size)
        return
    checked_array(ids)
    ids = _whole(ids)
    known = jnp.asarray(as_ids(ids, vocab_size))
    message = str(invalid_id_error(0, range(ids.ndim), vocab_size))
    _check_traced(checkify.check, ids, (known < 0) | (known >= vocab_size), "ids", message)


def check_targets(targets: ArrayLike, vocab_size: int, ignore_index: int) -> None:
    """Validate that targets are ignored or valid; traced ones under ``checkify`` only."""
    known = as_targets(targets, vocab_size, ignore_index)
    if not isinstance(targets, jax.core.Tracer):
        check_targets_valid(_on_host(targets), vocab_size, ignore_index)  # known is traced if this runs inside jit
        return
    message = str(invalid_target_error(0, range(targets.ndim), vocab_size, ignore_index))
    _check_traced(checkify.debug_check, _whole(targets), _whole(jnp.asarray(known)) == INVALID, "targets", message)


def _on_host(ids: ArrayLike) -> np.ndarray:
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        assert isinstance(ids.sharding, NamedSharding)
        ids = jax.device_put(ids, NamedSharding(ids.sharding.mesh, PartitionSpec()))
    return np.asarray(ids)


def _whole(ids: jax.Array) -> jax.Array:
    """Reshard traced ids to be split over no Explicit axis."""
    split = jax.typeof(ids).sharding
    if any(entry is not None for entry in split.spec):
        return jax.sharding.reshard(ids, NamedSharding(split.mesh, PartitionSpec(*[None] * ids.ndim)))
    return ids


def _check_traced(check: Callable[..., None], ids: jax.Array, bad: jax.Array, name: str, message: str) -> None:
    """Report the first bad id with checkify; ``message`` describes id 0."""
    if ids.size == 0:
        return
    first = jnp.argmax(bad.ravel())
    position = jnp.unravel_index(first, ids.shape)
    names = {f"i{n}": index for n, index in enumerate(position)}
    _, _, rule = message.partition(" = 0 ")
    where = f"{name}[{', '.join('{' + each + '}' for each in names)}]" if names else name
    check(~bad.ravel()[first], f"{where} = {{value}} {rule}", value=ids.ravel()[first], **names)


def checked_array(ids: jax.Array) -> jax.Array:
    """Validate an integer dtype; return the array."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ids_type_error(f"dtype {ids.dtype}", "an array")
    return ids


IGNORED, INVALID = -1, -2
"""Values of ``as_targets`` for targets that are no ids."""


def as_targets(targets: ArrayLike, vocab_size: int, ignore_index: int) -> jax.Array | np.ndarray:
    """Cast targets to int32, with ``IGNORED`` and ``INVALID`` marked.

    Ids of the vocabulary stay, ``ignore_index`` becomes ``IGNORED``, all other values become ``INVALID``.

    Args:
        targets: a JAX array, a NumPy array or a number, of any integer dtype.
        vocab_size: rows of the whole table.
        ignore_index: an integer in ``[-2**63, 2**63)``.

    Returns:
        int32 of the same shape: a JAX array for JAX targets, else a NumPy array.

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
