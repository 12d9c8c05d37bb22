"""Memory that another library hands out by DLPack: where it is, how it is laid out, and a NumPy view of it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["ALIGNMENT", "COPIES", "Memory", "exportable", "foreign_dtype_error", "sharing_error"]

COPIES = ("auto", "never", "always")
"""Whether an import copies: where it must, not at all, or in any case."""

ALIGNMENT = 64
"""Bytes to which ``Memory.copy`` aligns: JAX on a CPU shares no memory that is aligned to less (jaxlib 0.10.2)."""

_HOST_DEVICES = (1, 3, 11)  # DLPack's kDLCPU, kDLCUDAHost and kDLROCMHost: all are ordinary addresses
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY

_FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    **{(0, 8 * size): np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{(1, 8 * size): np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{(2, 8 * size): np.dtype(f"f{size}") for size in (2, 4, 8)},
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    **{(5, 8 * size): np.dtype(f"c{size}") for size in (8, 16)},
    (6, 8): np.dtype(bool),
    **{(code, 8): np.dtype(getattr(ml_dtypes, f"float8_{name}")) for code, name in enumerate(_FLOAT8, start=7)},
}
"""By DLPack's type code and number of bits."""


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned, of which version 1 fixes all fields."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Prototypes of our own: setting argtypes on ctypes.pythonapi would change what other modules call.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True, eq=False)
class Memory:
    """Where the elements of an array lie. The memory stays as long as this object or any view of it does.

    Attributes:
        pointer: address of the element with all indices 0; of no meaning where there are no elements.
        shape: elements along each dimension.
        strides: elements, not bytes, from one index to the next along each dimension.
        dtype: of the elements; None where NumPy and ml_dtypes have none such.
        device: DLPack's device type and number; ``(1, 0)`` is the CPU.
        read_only: the producer says that it may not be written to. JAX arrays do not say so (jax 0.10.2).
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any] | None
    device: tuple[int, int]
    read_only: bool
    _capsule: Any = field(repr=False)

    @classmethod
    def of(cls, array: Any) -> Memory:
        """The memory of any array that has ``__dlpack__`` and ``__dlpack_device__``, without copying it.

        Raises:
            TypeError: ``array`` has no such methods.
            ValueError: it refuses to give its memory out, as a tensor that requires a gradient does.

        Example:
            >>> import numpy as np
            >>> from shared.dlpack import Memory
            >>> memory = Memory.of(np.zeros((3, 4), np.float32).T)
            >>> memory.shape, memory.strides, memory.dtype, memory.device, memory.is_row_major
            ((4, 3), (1, 4), dtype('float32'), (1, 0), False)
        """
        if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
            raise TypeError(
                f"array must have __dlpack__ and __dlpack_device__, as NumPy, torch and JAX arrays do, "
                f"got {type(array).__name__}; make an array of it first"
            )
        # The conjugate's sign bit is no part of DLPack, and torch 2.13 hands such a tensor out with the sign lost.
        if callable(getattr(array, "is_neg", None)) and array.is_neg():
            raise ValueError(
                "array must not have torch's negative bit, which DLPack would lose; call resolve_neg() first"
            )
        capsule, tensor, flags = _export(exportable(array))
        shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
        strides = tuple(tensor.strides[: tensor.ndim]) if tensor.ndim and tensor.strides else _row_major(shape)
        dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
        if isinstance(array, np.ndarray):
            dtype = array.dtype
        pointer = (tensor.data or 0) + tensor.byte_offset
        if pointer == 0 and math.prod(shape):
            raise ValueError(
                f"array must have memory, got a {type(array).__name__} whose address is 0; pass its local part"
            )
        device = (tensor.device_type, tensor.device_id)
        return cls(pointer, shape, strides, dtype, device, bool(flags & _READ_ONLY), capsule)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def on_host(self) -> bool:
        """True where the CPU can read it."""
        return self.device[0] in _HOST_DEVICES

    @property
    def is_row_major(self) -> bool:
        """True where the elements lie one after another, the last index running fastest."""
        steps = zip(self.shape, self.strides, _row_major(self.shape), strict=True)
        return self.size == 0 or all(length == 1 or own == expected for length, own, expected in steps)

    @property
    def alignment(self) -> int:
        """The largest power of two that divides the address."""
        return self.pointer & -self.pointer

    def view(self) -> np.ndarray:
        """The same memory as a NumPy array, read-only, since the importing framework may take arrays as immutable.

        Raises:
            ValueError: the memory is not the host's, or its dtype is unknown.
        """
        if self.dtype is None or not self.on_host:
            raise ValueError(f"memory must be the host's and of a dtype that NumPy knows to be viewed, got {self}")
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        # Raw bytes first: the array interface has no names for the dtypes of ml_dtypes.
        return np.asarray(_Interface(self, self.dtype.itemsize)).view(self.dtype)

    def copy(self) -> np.ndarray:
        """A row-major copy in memory of its own, aligned to ``ALIGNMENT`` bytes.

        Raises:
            ValueError: the memory is not the host's, or its dtype is unknown.

        Example:
            >>> import numpy as np
            >>> from shared.dlpack import Memory
            >>> array = np.arange(6).reshape(2, 3)
            >>> copied = Memory.of(array.T).copy()
            >>> array[:] = 0
            >>> copied
            array([[0, 3],
                   [1, 4],
                   [2, 5]])
        """
        view = self.view()
        room = np.empty(view.nbytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        copied = room[start : start + view.nbytes].view(view.dtype).reshape(view.shape)
        np.copyto(copied, view)
        return copied


class _Interface:
    """NumPy's array interface of some memory; the arrays made of it keep it, and it keeps the memory."""

    def __init__(self, memory: Memory, itemsize: int) -> None:
        self._memory = memory
        self.__array_interface__ = {
            "version": 3,
            "data": (memory.pointer, True),
            "shape": memory.shape,
            "strides": tuple(stride * itemsize for stride in memory.strides),
            "typestr": f"|V{itemsize}",
        }


def exportable(array: Any) -> Any:
    """The array itself, or as unsigned integers where NumPy holds a dtype of ml_dtypes and would not export it.

    Example:
        >>> import ml_dtypes
        >>> import numpy as np
        >>> from shared.dlpack import exportable
        >>> exportable(np.ones(2, ml_dtypes.bfloat16))
        array([16256, 16256], dtype=uint16)
    """
    if isinstance(array, np.ndarray) and array.dtype.type.__module__ == "ml_dtypes" and array.dtype in _DTYPES.values():
        return array.view(f"u{array.dtype.itemsize}")
    return array


def sharing_error(reason: str) -> ValueError:
    """The error for memory that ``copy="never"`` cannot share."""
    return ValueError(f'copy must be "auto" or "always" for this array, got "never", but {reason}')


def foreign_dtype_error(dtype: np.dtype[Any] | None, framework: str) -> ValueError:
    """The error for elements of a dtype that the importing framework does not have."""
    return ValueError(
        f"array must have a dtype that {framework} has too, got {dtype or 'one that is unknown here'}; convert it first"
    )


def _export(array: Any) -> tuple[Any, _Tensor, int]:
    """The capsule, the tensor that it describes and the tensor's flags.

    The capsule keeps its name, by which it knows that nobody has taken the memory over: its end releases the memory.
    """
    try:
        try:
            capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:  # a producer of before version 1, which takes no such argument
            capsule = array.__dlpack__()
        name = _capsule_name(capsule)
        address = _capsule_pointer(capsule, name)
    except Exception as error:
        raise ValueError(f"array must be one that can be handed out by DLPack, got a refusal: {error}") from error
    if name == b"dltensor":
        return capsule, _Tensor.from_address(address), 0
    if name == b"dltensor_versioned":
        versioned = _Versioned.from_address(address)
        if versioned.major == 1:
            return capsule, versioned.tensor, versioned.flags
    raise ValueError(f"array must be handed out by DLPack 0.x or 1.x, got a capsule {name!r} of another version")


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
