"""What both backends ask of an array that another library hands over by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "address",
    "check_copy",
    "check_exporter",
    "dtype_name",
    "exportable",
    "foreign_dtype_error",
    "sharing_error",
]


def check_copy(copy: bool | None) -> bool | None:
    """Validate ``copy``, as in the array API standard: None copies only where it must, False never, True always.

    Raises:
        TypeError: it is something else.
    """
    if copy is not None and not isinstance(copy, bool):
        raise TypeError(f"copy must be None, True or False, got {copy!r}")
    return copy


def check_exporter(array: Any) -> None:
    """Refuse what DLPack cannot hand over.

    Raises:
        TypeError: ``array`` has no ``__dlpack__`` and ``__dlpack_device__``.
        ValueError: it is a torch tensor with the negative bit, which DLPack would lose (torch 2.13).
    """
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise TypeError(
            f"array must have __dlpack__ and __dlpack_device__, as NumPy, torch and JAX arrays do, "
            f"got {type(array).__name__}; convert it to an array first"
        )
    if callable(getattr(array, "is_neg", None)) and array.is_neg():
        raise ValueError("array must not have torch's negative bit, which DLPack would lose; call resolve_neg() first")


def dtype_name(array: Any) -> str:
    """Return the name of an array's dtype, ``"bfloat16"`` say, whatever its library."""
    return str(array.dtype).removeprefix("torch.")


def address(array: Any) -> int | None:
    """Return the address of an array's first element; None if its library does not tell."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(array, name):
            return int(getattr(array, name)())
    return None


def exportable(array: Any) -> Any:
    """View a NumPy array of one of ml_dtypes' dtypes as unsigned integers: NumPy exports no others by DLPack.

    Example:
        >>> import ml_dtypes
        >>> import numpy as np
        >>> from shared.dlpack import exportable
        >>> exportable(np.ones(2, ml_dtypes.bfloat16))
        array([16256, 16256], dtype=uint16)
    """
    if isinstance(array, np.ndarray) and array.dtype.type.__module__ == "ml_dtypes":
        return array.view(f"u{array.dtype.itemsize}")
    return array


def sharing_error(reason: str) -> ValueError:
    """Return the error for memory that ``copy=False`` cannot share."""
    return ValueError(f"copy must be None or True for this array, got False, but {reason}")


def foreign_dtype_error(name: str, framework: str) -> ValueError:
    """Return the error for a dtype that the importing framework lacks."""
    return ValueError(f"array must have a dtype that {framework} has too, got {name}; convert it first")
