"""Checks of arrays that come from another library through DLPack."""

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
    """Validate ``copy``: None copies if needed, False never, True always."""
    if copy is not None and not isinstance(copy, bool):
        raise TypeError(f"copy must be None, True or False, got {copy!r}")
    return copy


def check_exporter(array: Any) -> None:
    """Refuse an array without DLPack (TypeError) or with torch's negative bit (ValueError)."""
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise TypeError(
            f"array must have __dlpack__ and __dlpack_device__, as NumPy, torch and JAX arrays do, "
            f"got {type(array).__name__}; convert it to an array first"
        )
    if callable(getattr(array, "is_neg", None)) and array.is_neg():  # DLPack would drop the bit (torch 2.13)
        raise ValueError("array must not have torch's negative bit, which DLPack would lose; call resolve_neg() first")


def dtype_name(array: Any) -> str:
    """Name of an array's dtype, without torch's prefix."""
    return str(array.dtype).removeprefix("torch.")


def address(array: Any) -> int | None:
    """Address of an array's first element; None if unknown."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(array, name):
            return int(getattr(array, name)())
    return None


def exportable(array: Any) -> Any:
    """View ml_dtypes arrays as unsigned integers, which NumPy can export."""
    if isinstance(array, np.ndarray) and array.dtype.type.__module__ == "ml_dtypes":
        return array.view(f"u{array.dtype.itemsize}")
    return array


def sharing_error(reason: str) -> ValueError:
    """ValueError for memory that ``copy=False`` cannot share."""
    return ValueError(f"copy must be None or True for this array, got False, but {reason}")


def foreign_dtype_error(name: str, framework: str) -> ValueError:
    """ValueError for a dtype that the importing framework lacks."""
    return ValueError(f"array must have a dtype that {framework} has too, got {name}; convert it first")
