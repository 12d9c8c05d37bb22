"""Arrays of other libraries as torch tensors, shared where possible."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack as import_dlpack

from shared.dlpack import (
    address,
    check_copy,
    check_exporter,
    dtype_name,
    exportable,
    foreign_dtype_error,
    sharing_error,
)

__all__ = ["from_dlpack", "shards_from_dlpack"]


def from_dlpack(array: Any, *, copy: bool | None = None) -> Tensor:
    """Import another library's array as a tensor, bit for bit.

    Device and dtype stay. A tensor that shares memory keeps it alive. Writing to it changes the array, even a JAX
    array, which JAX assumes immutable and may still be reading.

    Args:
        array: has ``__dlpack__`` and ``__dlpack_device__``: a JAX array on one device or replicated, or a NumPy array,
            also of ml_dtypes' dtypes.
        copy: as in the array API standard. None copies only what torch cannot share: NumPy arrays that have negative
            strides, are read-only, or are not aligned. False refuses these. True always copies.

    Raises:
        TypeError: ``array`` has no such methods.
        ValueError: the array cannot be exported, for example because it requires a gradient; torch lacks its dtype; it
            is split over several devices; its memory cannot be shared and ``copy`` is False.

    Example:
        >>> import numpy as np
        >>> from torch_impl.dlpack import from_dlpack
        >>> array = np.zeros((2, 3), np.float32)
        >>> shared, apart = from_dlpack(array, copy=False), from_dlpack(array, copy=True)
        >>> shared[0, 0] = 7
        >>> float(array[0, 0]), float(apart[0, 0])
        (7.0, 0.0)
    """
    copy = check_copy(copy)
    array = _on_one_device(array)
    check_exporter(array)
    dtype = getattr(torch, dtype_name(array), None)
    if not isinstance(dtype, torch.dtype):
        raise foreign_dtype_error(dtype_name(array), "torch")
    if isinstance(array, np.ndarray):
        obstacle = _obstacle(array)
        if obstacle and copy is False:
            raise sharing_error(obstacle)
        array = array.copy() if copy or obstacle else array
    try:
        tensor = import_dlpack(exportable(array))
    except Exception as error:
        raise ValueError(f"array must be one that torch can import, got a refusal: {error}") from error
    if copy and not isinstance(array, np.ndarray):
        tensor = tensor.clone()
        if tensor.device.type != "cpu":
            # Once this returns, the producer may reuse its memory on another stream.
            torch.accelerator.synchronize(tensor.device)
    if copy is False and tensor.numel() and address(array) not in (None, tensor.data_ptr()):
        raise sharing_error("torch copied it")
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def shards_from_dlpack(array: Any, *, copy: bool | None = None) -> list[Tensor]:
    """Import an array split along dimension 0, one tensor per rank.

    For a table sharded ``PartitionSpec("tp", None)`` element r is rank r's rows. Of replicas over further mesh axes one
    is taken. With several processes each gets the parts on its own devices.

    Args:
        array: a ``jax.Array``, or an object with ``shape`` and ``addressable_shards``, which have ``data``, ``index``
            and ``replica_id``.
        copy: as in ``from_dlpack``, for each part.

    Raises:
        TypeError: ``array`` has no shards.
        ValueError: the array is split along another dimension; or as in ``from_dlpack``.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from torch_impl.dlpack import shards_from_dlpack
        >>> table = np.arange(4.0).reshape(4, 1)
        >>> index = [(slice(start, start + 2), slice(None)) for start in (0, 2)]
        >>> shards = [SimpleNamespace(data=table[rows], index=rows, replica_id=0) for rows in index]
        >>> [shard.tolist() for shard in shards_from_dlpack(SimpleNamespace(shape=(4, 1), addressable_shards=shards))]
        [[[0.0], [1.0]], [[2.0], [3.0]]]
    """
    shards = getattr(array, "addressable_shards", None)
    if shards is None:
        raise TypeError(
            f"array must have addressable_shards, as a jax.Array has, got {type(array).__name__}; "
            f"pass an array that is not sharded to from_dlpack"
        )
    parts: dict[int, Any] = {}
    for shard in sorted(shards, key=lambda shard: shard.replica_id):
        if shard.data.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"array must be split along dimension 0 only, got parts of shape {tuple(shard.data.shape)} "
                f"of an array of shape {tuple(array.shape)}; lay it out so first"
            )
        start = shard.index[0].start if shard.index else 0
        parts.setdefault(start or 0, shard.data)
    return [from_dlpack(parts[start], copy=copy) for start in sorted(parts)]


def _on_one_device(array: Any) -> Any:
    """The array, or one replica: DLPack does not export multi-device arrays."""
    shards = getattr(array, "addressable_shards", None)
    if not shards:
        return array
    if shards[0].data.shape != array.shape:
        raise ValueError(
            f"array must be on one device or replicated, got one of shape {tuple(array.shape)} split into parts of shape "
            f"{tuple(shards[0].data.shape)}; shards_from_dlpack returns the parts"
        )
    return shards[0].data


def _obstacle(array: np.ndarray) -> str | None:
    """Why a NumPy array's memory must not be shared; else None.

    torch 2.13 aborts for some of these, and shares others.
    """
    if not array.size:
        return None
    if min(array.strides, default=0) < 0:
        return f"torch has no negative strides, and its strides are {array.strides} bytes"
    if not array.flags.writeable:
        return "it is read-only, and torch writes to any tensor"
    if not array.flags.aligned:
        return f"its memory is not aligned to its elements of {array.itemsize} bytes"
    return None
