"""Arrays of other libraries as JAX arrays, without copying where that is possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl.placement import axes_of
from shared.checks import check_choice
from shared.dlpack import ALIGNMENT, COPIES, Memory, foreign_dtype_error, sharing_error

__all__ = ["array_from_dlpack", "from_dlpack"]


def from_dlpack(array: Any, *, copy: str = "auto") -> jax.Array:
    """An array of another library as a JAX array, on the device it is on, bit for bit and in its dtype.

    Without a copy both are the same memory, which lives as long as either does: what is written into the other array
    afterwards changes this one, although JAX takes its arrays as immutable and may be reading it for a result that is not
    ready yet. JAX itself never writes to it: memory that it imported and was then given by donation is not reused.

    Args:
        array: anything with ``__dlpack__`` and ``__dlpack_device__``: a torch tensor, a NumPy array, one of ml_dtypes'
            dtypes included, a JAX array on one device.
        copy: ``"auto"`` copies only where JAX cannot share the memory: where it is not row-major, or, on a CPU, not
            aligned to 64 bytes; ``"never"`` refuses these; ``"always"`` copies, so that writing to one never shows in
            the other.

    Raises:
        TypeError: ``array`` has no such methods.
        ValueError: it cannot be handed out, because it requires a gradient, say; JAX does not have its dtype, or would
            narrow it, as 64-bit ones where ``jax_enable_x64`` is off; ``copy="never"`` and the memory cannot be shared.

    Example:
        >>> import numpy as np
        >>> from jax_impl.dlpack import from_dlpack
        >>> array = np.zeros((2, 3), np.float32)
        >>> apart = from_dlpack(array.T, copy="always")
        >>> array[0, 0] = 7
        >>> apart.shape, float(apart[0, 0])
        ((3, 2), 0.0)
    """
    copy = check_choice("copy", copy, COPIES)
    return _on_devices(array, Memory.of(array), None, copy)[0]


def array_from_dlpack(shards: Sequence[Any], sharding: NamedSharding, *, copy: str = "auto") -> jax.Array:
    """One global array of the parts that the ranks hold, such as a table of the ranks' rows.

    On CPUs any device shares memory: nothing is copied for a mesh of several, and the replicas over further axes of the
    mesh share it too.

    Args:
        shards: the parts, in the order of the ranks: arrays as ``from_dlpack`` takes them, of the same shape and dtype.
            Of several processes, each passes the parts that its own devices hold.
        sharding: how the array is laid out: split along dimension 0 or not at all, as ``PartitionSpec("tp", None)``.
        copy: as in ``from_dlpack``, for each part on each device; a part on another device than it is to be on is always
            copied there, or refused.

    Returns:
        An array of as many rows as all ranks' parts together, in their dtype, with that sharding.

    Raises:
        TypeError: ``shards`` is no sequence, ``sharding`` no NamedSharding, or a part has no ``__dlpack__``.
        ValueError: the parts are not of one shape and dtype, or not as many as the sharding has on this process's
            devices; the sharding splits another dimension; or as in ``from_dlpack``.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from jax_impl.dlpack import array_from_dlpack
        >>> w = jax.device_count()
        >>> sharding = NamedSharding(jax.make_mesh((w,), ("tp",)), PartitionSpec("tp", None))
        >>> table = array_from_dlpack([np.full((2, 3), rank, np.float32) for rank in range(w)], sharding)
        >>> table.shape == (2 * w, 3), float(np.asarray(table)[-1, 0]) == w - 1
        (True, True)
    """
    copy = check_choice("copy", copy, COPIES)
    if not isinstance(shards, Sequence):
        raise TypeError(f"shards must be a sequence of arrays, one per rank, got {type(shards).__name__}")
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"sharding must be a jax.sharding.NamedSharding, got {type(sharding).__name__}")
    if not shards:
        raise ValueError("shards must hold at least one array, got none; pass the parts of this process's ranks")
    memories = [Memory.of(shard) for shard in shards]
    first = memories[0]
    for number, memory in enumerate(memories):
        if (memory.shape, memory.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"shards must all have one shape and dtype, got {first.shape} of {first.dtype} first "
                f"and {memory.shape} of {memory.dtype} as shards[{number}]"
            )
    shape, ranks = _global_shape(first.shape, sharding)
    if len(ranks) != len(shards):
        raise ValueError(
            f"shards must be as many as the parts of the array on this process's devices, {len(ranks)} "
            f"with {sharding.spec} on a mesh {dict(sharding.mesh.shape)}, got {len(shards)}"
        )
    parts = [
        part
        for shard, memory, devices in zip(shards, memories, ranks, strict=True)
        for part in _on_devices(shard, memory, devices, copy)
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _global_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[tuple[int, ...], list[list[jax.Device]]]:
    """The shape of all parts together, and for each part that this process holds the devices that it goes to."""
    axes = axes_of(PartitionSpec(*sharding.spec[:1]))
    world_size = math.prod(sharding.mesh.shape[axis] for axis in axes)
    whole = (shape[0] * world_size, *shape[1:]) if shape else ()
    if sharding.shard_shape(whole) != shape:
        raise ValueError(f"sharding must split dimension 0 only, got {sharding.spec} for parts of shape {shape}")
    # Of one row per rank: parts without rows would all start at the same one.
    ranks: dict[int, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map((world_size, *shape[1:]) if shape else ()).items():
        start = index[0].start if index else 0
        ranks.setdefault(start or 0, []).append(device)
    return whole, [ranks[start] for start in sorted(ranks)]


def _on_devices(array: Any, memory: Memory, devices: list[jax.Device] | None, copy: str) -> list[jax.Array]:
    """The array on each of the devices, or on the one where its memory is."""
    _check_dtype(memory.dtype)
    source: Any
    if memory.on_host:
        devices = devices or jax.local_devices(backend="cpu")[:1]
        source = _on_host(memory, devices[0], copy)
    else:
        source = _on_accelerator(array, memory, copy)
        devices = devices or list(source.devices())
    # may_alias=False would alias no less, and a copy of JAX's own may still be under way when device_put returns.
    imported = jax.block_until_ready([jax.device_put(source, device, may_alias=True) for device in devices])
    if copy == "never" and memory.size:
        for each in imported:
            if each.unsafe_buffer_pointer() != memory.pointer:
                raise sharing_error(f"JAX copied it to {each.device}, from address {memory.pointer:#x}")
    return imported


def _check_dtype(dtype: np.dtype[Any] | None) -> None:
    if dtype is None:
        raise foreign_dtype_error(dtype, "JAX")
    narrowed = jax.dtypes.canonicalize_dtype(dtype)
    if narrowed != dtype:
        raise ValueError(
            f"array must have a dtype that JAX keeps, got {dtype}, which it would narrow to {narrowed}: "
            f"set jax_enable_x64, convert the array yourself, or call jax_impl.as_ids if it holds ids"
        )


def _on_host(memory: Memory, device: jax.Device, copy: str) -> np.ndarray:
    """The memory itself, or a copy where JAX on a CPU would not share it, or is not to."""
    obstacle = None
    if device.platform != "cpu":
        obstacle = f"it is in the host's memory, and not in that of {device}"
    elif memory.size and memory.pointer % ALIGNMENT:
        obstacle = (
            f"its memory is aligned to {memory.alignment} bytes, and JAX on a CPU shares {ALIGNMENT}-byte-aligned one"
        )
    elif not memory.is_row_major:
        obstacle = _strides(memory)
    if obstacle and copy == "never":
        raise sharing_error(obstacle)
    if device.platform == "cpu" and (obstacle or copy == "always"):
        return memory.copy()
    return memory.view()


class _Copied:
    """An array that hands out a copy, which its own library makes."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(copy=True, **options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _on_accelerator(array: Any, memory: Memory, copy: str) -> jax.Array:
    """The array on the device it is on; strides that JAX does not have are for its own library to undo."""
    compact = memory.is_row_major
    if not compact and copy == "never":
        raise sharing_error(_strides(memory))
    try:
        imported = jax.dlpack.from_dlpack(array if compact else _Copied(array))
    except Exception as error:
        raise ValueError(f"array must be one that JAX can import, got a refusal: {error}") from error
    # copy=True of jax.dlpack.from_dlpack would alias (jax 0.10.2).
    return jnp.array(imported, copy=True) if copy == "always" else imported


def _strides(memory: Memory) -> str:
    return f"its strides {memory.strides} are not row-major, as JAX lays out an array of shape {memory.shape}"
