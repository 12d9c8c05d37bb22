"""Arrays of other libraries as torch tensors, without copying where that is possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack as import_dlpack

from shared.checks import check_choice
from shared.dlpack import COPIES, Memory, exportable, foreign_dtype_error, sharing_error

__all__ = ["from_dlpack", "shards_from_dlpack"]


def from_dlpack(array: Any, *, copy: str = "auto") -> Tensor:
    """An array of another library as a tensor, on the device it is on, bit for bit and in its dtype.

    Without a copy both are the same memory, which lives as long as either does: what is written into the tensor changes
    the array, a JAX array too, although JAX takes its arrays as immutable and may be reading it for a result that is not
    ready yet.

    Args:
        array: anything with ``__dlpack__`` and ``__dlpack_device__``: a JAX array on one device or replicated over
            several, a NumPy array, one of ml_dtypes' dtypes included.
        copy: ``"auto"`` copies only where torch cannot share the memory: negative strides, memory that is marked
            read-only (torch would write to it), or not aligned to its elements; ``"never"`` refuses these; ``"always"``
            copies, so that writing to one never shows in the other.

    Raises:
        TypeError: ``array`` has no such methods.
        ValueError: it cannot be handed out, because it requires a gradient, say; torch does not have its dtype; it is
            split over several devices; ``copy="never"`` and the memory cannot be shared.

    Example:
        >>> import numpy as np
        >>> from torch_impl.dlpack import from_dlpack
        >>> array = np.zeros((2, 3), np.float32)
        >>> shared, apart = from_dlpack(array, copy="never"), from_dlpack(array, copy="always")
        >>> shared[0, 0] = 7
        >>> float(array[0, 0]), float(apart[0, 0])
        (7.0, 0.0)
    """
    copy = check_choice("copy", copy, COPIES)
    array = _on_one_device(array)
    memory = Memory.of(array)
    dtype = getattr(torch, memory.dtype.name, None) if memory.dtype is not None else None
    if not isinstance(dtype, torch.dtype):
        raise foreign_dtype_error(memory.dtype, "torch")
    obstacle = _obstacle(memory)
    if obstacle and (copy == "never" or not memory.on_host):
        raise sharing_error(obstacle)
    if memory.on_host and (copy == "always" or obstacle):
        array = memory.copy()
    try:
        tensor = import_dlpack(exportable(array))
    except Exception as error:
        raise ValueError(f"array must be one that torch can import, got a refusal: {error}") from error
    if copy == "always" and not memory.on_host:
        tensor = tensor.clone()
        # The producer may reuse its memory once this returns, on a stream that knows nothing of torch's.
        torch.accelerator.synchronize(tensor.device)
    if copy == "never" and memory.size and tensor.data_ptr() != memory.pointer:
        raise sharing_error(f"torch took its memory to {tensor.data_ptr():#x} from {memory.pointer:#x}")
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def shards_from_dlpack(array: Any, *, copy: str = "auto") -> list[Tensor]:
    """The parts of an array that is split along dimension 0 over the devices of a mesh, one tensor per rank.

    Of a table sharded ``PartitionSpec("tp", None)``, element r is rank r's rows; over further axes of the mesh, where it
    is replicated, one replica is taken. Of several processes each gets the parts on its own devices.

    Args:
        array: a ``jax.Array``, or whatever has ``shape`` and ``addressable_shards`` with ``data``, ``index`` and
            ``replica_id``.
        copy: as in ``from_dlpack``, for each part.

    Raises:
        TypeError: ``array`` has no shards.
        ValueError: it is split along another dimension too; or as in ``from_dlpack``.

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
    """The array, or one replica of it; of a JAX array on several devices, DLPack gives nothing out."""
    shards = getattr(array, "addressable_shards", None)
    if not shards:
        return array
    if shards[0].data.shape != array.shape:
        raise ValueError(
            f"array must be on one device or replicated, got one of shape {tuple(array.shape)} split into parts of shape "
            f"{tuple(shards[0].data.shape)}; shards_from_dlpack returns the parts"
        )
    return shards[0].data


def _obstacle(memory: Memory) -> str | None:
    """Why torch cannot share the memory, or None."""
    if memory.size == 0:
        return None
    if min(memory.strides, default=0) < 0:  # torch 2.13 does not refuse them: it ends the process
        return f"torch has no negative strides, and its strides are {memory.strides}"
    if memory.read_only:
        return "its memory is marked read-only, and torch writes to any tensor"
    assert memory.dtype is not None
    if memory.pointer % min(memory.dtype.itemsize, 8):
        return f"its memory is aligned to {memory.alignment} bytes, and its elements have {memory.dtype.itemsize}"
    return None
