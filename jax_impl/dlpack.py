"""Import of other libraries' arrays into JAX, without copies where possible."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl.placement import axes_of
from shared.dlpack import address, check_copy, check_exporter, dtype_name, foreign_dtype_error, sharing_error

__all__ = ["array_from_dlpack", "from_dlpack"]


_ALIGNMENT = 64
"""Alignment in bytes of memory that JAX on a CPU shares (jax 0.10.2)."""


def from_dlpack(array: Any, *, copy: bool | None = None) -> jax.Array:
    """Import another library's array as a JAX array, bit for bit.

    Device and dtype stay. An array that shares memory keeps it alive. Writing to the source then changes the JAX array,
    which JAX assumes immutable and may still be reading. JAX never writes to imported memory, donated or not.

    Args:
        array: any object with ``__dlpack__`` and ``__dlpack_device__``: a torch tensor, a NumPy array (``ml_dtypes``
            included), or a JAX array on one device.
        copy: as in the array API standard. None copies only memory that JAX cannot share: memory with gaps and, on a CPU,
            memory not aligned to 64 bytes. False refuses these. True always copies.

    Raises:
        TypeError: ``array`` lacks these methods.
        ValueError: ``array`` cannot be exported, for example because it requires a gradient; JAX lacks its dtype or would
            narrow it, as 64-bit dtypes without ``jax_enable_x64``; ``copy=False`` and the memory cannot be shared.

    Example:
        >>> import numpy as np
        >>> from jax_impl.dlpack import from_dlpack
        >>> array = np.zeros((2, 3), np.float32)
        >>> apart = from_dlpack(array.T, copy=True)
        >>> array[0, 0] = 7
        >>> apart.shape, float(apart[0, 0])
        ((3, 2), 0.0)
    """
    return _on_devices(array, None, check_copy(copy))[0]


def array_from_dlpack(shards: Sequence[Any], sharding: NamedSharding, *, copy: bool | None = None) -> jax.Array:
    """Assemble a global array, such as a table, from the ranks' parts.

    All CPU devices share one memory, so replicas over further mesh axes are not copied.

    Args:
        shards: the parts in rank order, as ``from_dlpack`` takes them, of one shape and dtype. Each process passes the parts
            of its own devices.
        sharding: split along dimension 0 or not at all, such as ``PartitionSpec("tp", None)``.
        copy: as in ``from_dlpack``, for each part on each device. A part on another device is copied, or refused.

    Returns:
        An array with the rows of all ranks, in the parts' dtype, with that sharding.

    Raises:
        TypeError: ``shards`` is no sequence, ``sharding`` is no NamedSharding, or a part has no ``__dlpack__``.
        ValueError: the parts differ in shape or dtype; their number is not that of the parts on this process's devices; the
            sharding splits another dimension; or as in ``from_dlpack``.

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
    copy = check_copy(copy)
    if not isinstance(shards, Sequence):
        raise TypeError(f"shards must be a sequence of arrays, one per rank, got {type(shards).__name__}")
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"sharding must be a jax.sharding.NamedSharding, got {type(sharding).__name__}")
    if not shards:
        raise ValueError("shards must hold at least one array, got none; pass the parts of this process's ranks")
    for shard in shards:
        check_exporter(shard)
    kinds = [(tuple(shard.shape), dtype_name(shard)) for shard in shards]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"shards must all have one shape and dtype, got {kinds[0][0]} of {kinds[0][1]} first "
                f"and {kind[0]} of {kind[1]} as shards[{number}]"
            )
    shape, ranks = _global_shape(kinds[0][0], sharding)
    if len(ranks) != len(shards):
        raise ValueError(
            f"shards must be as many as the parts of the array on this process's devices, {len(ranks)} "
            f"with {sharding.spec} on a mesh {dict(sharding.mesh.shape)}, got {len(shards)}"
        )
    parts = [part for shard, devices in zip(shards, ranks, strict=True) for part in _on_devices(shard, devices, copy)]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _global_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[tuple[int, ...], list[list[jax.Device]]]:
    """Global shape, and the devices of each part of this process."""
    axes = axes_of(PartitionSpec(*sharding.spec[:1]))
    world_size = math.prod(sharding.mesh.shape[axis] for axis in axes)
    whole = (shape[0] * world_size, *shape[1:]) if shape else ()
    if sharding.shard_shape(whole) != shape:
        raise ValueError(f"sharding must split dimension 0 only, got {sharding.spec} for parts of shape {shape}")
    # Index an array of one row per rank: empty parts would all start at row 0.
    ranks: dict[int, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map((world_size, *shape[1:]) if shape else ()).items():
        start = index[0].start if index else 0
        ranks.setdefault(start or 0, []).append(device)
    return whole, [ranks[start] for start in sorted(ranks)]


def _on_devices(array: Any, devices: list[jax.Device] | None, copy: bool | None) -> list[jax.Array]:
    """Import the array onto each device; by default where its memory is."""
    check_exporter(array)
    _check_dtype(dtype_name(array))
    source = _host_array(array, copy) if isinstance(array, np.ndarray) else _imported(array, copy)
    if isinstance(source, jax.Array) and next(iter(source.devices())).platform == "cpu" and devices:
        source = np.asarray(source)  # a view, which every CPU device shares
    targets: Sequence[jax.Device | None] = devices or [None]
    # device_put returns before its copy is done.
    found = jax.block_until_ready([jax.device_put(source, device, may_alias=True) for device in targets])
    start = address(array)
    if copy is False and math.prod(array.shape) and start is not None:
        for each in found:
            if each.unsafe_buffer_pointer() != start:
                raise sharing_error(_why_copied(start, each))
    return found


def _check_dtype(name: str) -> None:
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise foreign_dtype_error(name, "JAX") from error
    narrowed = jax.dtypes.canonicalize_dtype(dtype)
    if narrowed != dtype:
        raise ValueError(
            f"array must have a dtype that JAX keeps, got {dtype}, which it would narrow to {narrowed}: "
            f"set jax_enable_x64, convert the array yourself, or call jax_impl.as_ids if it holds ids"
        )


def _host_array(array: np.ndarray, copy: bool | None) -> np.ndarray:
    """Row-major NumPy array that JAX may alias; a copy if needed."""
    if copy is False and not array.flags.c_contiguous:
        raise sharing_error(f"its strides of {array.strides} bytes are not row-major")
    return np.array(array) if copy or not array.flags.c_contiguous else array


def _imported(array: Any, copy: bool | None) -> jax.Array:
    """Import over DLPack; ``contiguous()`` of its library first if JAX refuses."""
    try:
        try:
            imported = jax.dlpack.from_dlpack(array)
        except Exception:
            if copy is False or not hasattr(array, "contiguous"):
                raise
            imported = jax.dlpack.from_dlpack(array.contiguous())
    except Exception as error:
        raise ValueError(f"array must be one that JAX can import, got a refusal: {error}") from error
    # jax.dlpack.from_dlpack(copy=True) aliases (jax 0.10.2).
    return jnp.array(imported, copy=True) if copy else imported


def _why_copied(start: int, imported: jax.Array) -> str:
    device = next(iter(imported.devices()))
    if device.platform == "cpu" and start % _ALIGNMENT:
        return f"its memory is aligned to {start & -start} bytes, and JAX on a CPU shares {_ALIGNMENT}-byte-aligned one"
    return f"JAX copied it to {device}"
