"""Ids of any integer dtype, made fit for arithmetic without narrowing."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared.checks import ids_type_error, invalid_id_error

__all__ = ["check_ids_valid", "first_invalid", "widen"]


def widen(ids: Any) -> Any:
    """Return the ids in a signed integer type in which ``ids - start`` cannot wrap on to another rank's rows.

    NumPy arrays become int64, torch tensors int64, JAX arrays at least int32; a Python int stays one. Unsigned ids that
    the signed type cannot hold come out negative, hence outside every vocabulary, never another id.

    Raises:
        TypeError: the ids hold floats, bools or anything else that is not an integer.

    Example:
        >>> import numpy as np
        >>> from shared.ids import widen
        >>> widen(np.array([200, 255], dtype=np.uint8)) - 100
        array([100, 155])
    """
    if isinstance(ids, int) and not isinstance(ids, bool):
        return ids
    dtype = getattr(ids, "dtype", type(ids).__name__)
    name = getattr(dtype, "name", str(dtype))
    dtype = name.removeprefix("torch.")
    if not dtype.startswith(("int", "uint")) or dtype == "int":
        raise ids_type_error(dtype, "an array")
    if name.startswith("torch."):
        return ids.long()
    if isinstance(ids, (np.ndarray, np.generic)):
        return ids.astype(np.int64)
    return ids.astype("int64" if dtype.endswith("64") else "int32")


def first_invalid(ids: np.ndarray, vocab_size: int) -> tuple[int, tuple[int, ...]] | None:
    """The first id outside ``[0, vocab_size)`` in row-major order, with its position, or None.

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
    """Raise IndexError naming the first id outside ``[0, vocab_size)``, its position and the legal range."""
    found = first_invalid(ids, vocab_size)
    if found is not None:
        raise invalid_id_error(*found, vocab_size)
