"""Ids of any integer dtype, widened and range-checked."""

from typing import Any, Protocol, TypeVar

import numpy as np

from shared.checks import ids_type_error, invalid_id_error

__all__ = ["Ids", "IdsT", "check_ids_valid", "first_invalid", "widen"]


class Ids(Protocol):
    """NumPy array, torch tensor, JAX array, tracer or int of ids."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __floordiv__(self, other: Any, /) -> Any: ...
    def __mod__(self, other: Any, /) -> Any: ...
    def __and__(self, other: Any, /) -> Any: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __ge__(self, other: Any, /) -> Any: ...


IdsT = TypeVar("IdsT", bound=Ids)
"""The type of the ids given; results have it too."""


def widen(ids: IdsT) -> IdsT:
    """Cast ids to a signed integer dtype in which subtraction cannot wrap.

    NumPy arrays and torch tensors become int64, JAX arrays at least int32. A Python int is returned as it is. Unsigned ids
    too large for the signed dtype become negative, hence invalid.

    Raises:
        TypeError: the ids are not integers.

    Example:
        >>> import numpy as np
        >>> from shared.ids import widen
        >>> widen(np.array([200, 255], dtype=np.uint8)) - 100
        array([100, 155])
    """
    if isinstance(ids, int) and not isinstance(ids, bool):
        return ids
    array: Any = ids
    dtype = getattr(array, "dtype", type(array).__name__)
    name = getattr(dtype, "name", str(dtype))
    dtype = name.removeprefix("torch.")
    if not dtype.startswith(("int", "uint")) or dtype == "int":
        raise ids_type_error(dtype, "an array")
    if name.startswith("torch."):
        return array.long()
    wide = isinstance(array, (np.ndarray, np.generic)) or dtype.endswith("64")
    return array.astype("int64" if wide else "int32")


def first_invalid(ids: np.ndarray, vocab_size: int) -> tuple[int, tuple[int, ...]] | None:
    """First invalid id in row-major order, with its position; or None.

    Example:
        >>> import numpy as np
        >>> from shared.ids import first_invalid
        >>> first_invalid(np.array([[3, 8], [-1, 2]]), 8)
        (8, (0, 1))
    """
    bad = (ids < 0) | (ids >= vocab_size)
    if not bad.any():
        return None
    position = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), ids.shape))
    return int(ids[position]), position


def check_ids_valid(ids: np.ndarray, vocab_size: int) -> None:
    """Raise IndexError for the first id outside ``[0, vocab_size)``."""
    if found := first_invalid(ids, vocab_size):
        raise invalid_id_error(*found, vocab_size)
