"""A tall array of which most rows are zero, kept as the rows that are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.bits import unsigned_view

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """The rows of a ``[total, e]`` array that are not +0.0 in every bit: nothing is lost, -0.0 and NaN are kept.

    Attributes:
        index: their row numbers, ascending, int64 ``[k]``.
        values: the rows, ``[k, e]``.
        total: number of rows, the zero ones included.
    """

    index: np.ndarray
    values: np.ndarray
    total: int

    @classmethod
    def of(cls, array: np.ndarray) -> Rows:
        """The rows of an array ``[..., e]``, its leading dimensions flattened.

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
        """The rows numbered ``index``, zero ones included."""
        found = np.zeros((len(index), self.values.shape[1]), self.values.dtype)
        if len(self.index):
            slot = np.minimum(np.searchsorted(self.index, index), len(self.index) - 1)
            present = self.index[slot] == index
            found[present] = self.values[slot[present]]
        return found
