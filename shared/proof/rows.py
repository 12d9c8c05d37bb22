"""Tall arrays of mostly zero rows, stored as their nonzero rows."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from shared.bits import unsigned_view

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """Rows with any nonzero bit, of an array ``[total, e]``.

    Attributes:
        index: row numbers, ascending, int64 ``[k]``.
        values: the rows, ``[k, e]``.
        total: number of all rows.
    """

    index: np.ndarray
    values: np.ndarray
    total: int

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """Nonzero rows of an array ``[..., e]``, its leading dimensions flattened.

        Example:
            >>> import numpy as np
            >>> from shared.proof.rows import Rows
            >>> Rows.of(np.array([[0.0, 0.0], [0.0, 5.0], [-0.0, 0.0]])).index
            array([1, 2])
        """
        flat = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        index = np.flatnonzero(unsigned_view(flat).any(axis=1))
        return cls(index, flat[index], len(flat))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows numbered ``index``, zero rows included."""
        found = np.zeros((len(index), self.values.shape[1]), self.values.dtype)
        if len(self.index):
            slot = np.minimum(np.searchsorted(self.index, index), len(self.index) - 1)
            present = self.index[slot] == index
            found[present] = self.values[slot[present]]
        return found
