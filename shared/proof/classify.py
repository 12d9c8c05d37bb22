"""Kinds of difference of a row, in an embedding's terms."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from shared.bits import row_hashes, unsigned_view
from shared.partition import VocabPartition

__all__ = ["KINDS", "Differing", "Reference", "classify"]

_MAX_ROUNDING_ULP = 4
"""Largest distance, in representable values, that counts as rounding: a sum in another order or precision."""

KINDS = {
    "ranks swapped": "the row, or the whole result, of another rank",
    "rows swapped": "the row of another id, whose place holds this row",
    "off by one row": "the row of the next or the previous id",
    "other row": "the row of some other id",
    "subnormal flushed": "zero in place of subnormal numbers, as some hardware flushes them",
    "zeroed": "zeros in place of the row",
    "hole filled": "values where zeros should be: the rank does not own the id, or the id does not occur",
    "padding only": "only rows without meaning: of ids outside the vocabulary, or the gradient of padding_idx",
    "rounding only": f"no element further away than {_MAX_ROUNDING_ULP} representable values",
    "sign of zero": "+0.0 against -0.0",
    "row missing": "a row that only one of two tables has",
    "NaN": "NaN on one side only, or another NaN",
    "other values": "none of these",
}
"""Kinds of difference and their meaning."""


class Reference:
    """Correct rows of a whole table, by hash.

    ``hashes`` are uint64 ``[v]``, 0 for zero rows.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self._hashes, self._order = hashes, np.argsort(hashes, kind="stable")

    def find(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Id of each row; -1 for none.

        Of several ids, the one in ``ids`` is taken, else a neighbour of it, else any.
        """
        hashes, known, order = row_hashes(rows), self._hashes, self._order
        slot = np.minimum(np.searchsorted(known, hashes, sorter=order), len(known) - 1)
        held = np.where(known[order[slot]] == hashes, order[slot], -1)
        for near in (ids - 1, ids + 1, ids):
            inside = (near >= 0) & (near < len(known))
            held = np.where(inside & (known[np.where(inside, near, 0)] == hashes), near, held)
        return np.where(unsigned_view(rows).any(axis=1), held, -1)


@dataclass(frozen=True)
class Differing:
    """Differing rows of two sides.

    Attributes:
        ids, index: their ids ``[k]``, and positions ``[k, d]``.
        values: left and right rows, each ``[k, e]``.
        references: what each side should have taken its rows from.
        expected: whether each should be present rather than zero, ``[k]``.
        kinds: of each, empty text if not known yet, ``[k]``.
    """

    ids: np.ndarray
    index: np.ndarray
    values: tuple[np.ndarray, np.ndarray]
    references: tuple[Reference, Reference]
    expected: np.ndarray
    kinds: np.ndarray


def classify(rows: Differing, ulp: np.ndarray, partition: VocabPartition, padding_idx: int | None = None) -> np.ndarray:
    """Set the kind of rows that have none: the first that fits.

    ``ulp`` ``[k, e]`` are distances. The row of ``padding_idx`` does not matter.

    Returns:
        ``[2, k]``: the id whose row each side holds; -1 for none.
    """

    def settle(kind: str, where: np.ndarray | np.bool_) -> None:
        rows.kinds[(rows.kinds == "") & where] = kind

    ids, (left, right) = rows.ids, rows.values
    settle("padding only", ~partition.is_valid(ids))
    if padding_idx is not None:
        settle("padding only", ids == padding_idx)
    settle("sign of zero", (left == right).all(axis=1))
    found = (reference.find(side, ids) for reference, side in zip(rows.references, rows.values, strict=True))
    held = np.stack([*found])
    distance = np.where(held >= 0, np.abs(held - ids), 0)
    across = (distance > 0) & (distance % partition.rows_per_rank == 0)
    settle("rows swapped", (held[0] == held[1]) & (distance[0] > 0) & ~across[0])
    settle("off by one row", (distance == 1).any(axis=0))
    settle("ranks swapped", across.any(axis=0))
    settle("other row", (distance > 0).any(axis=0))
    settle("subnormal flushed", _flushed(left, right))
    zero = ~unsigned_view(left).any(axis=1) | ~unsigned_view(right).any(axis=1)
    settle("zeroed", zero & rows.expected)
    settle("hole filled", zero)
    unequal = unsigned_view(left) != unsigned_view(right)
    settle("NaN", (np.isnan(ulp) & unequal).any(axis=1))
    settle("rounding only", (~unequal | (ulp <= _MAX_ROUNDING_ULP)).all(axis=1))
    settle("other values", np.True_)
    return held


def _flushed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether each row differs only by subnormals flushed to zero."""
    a, b, smallest_normal = np.abs(left), np.abs(right), ml_dtypes.finfo(left.dtype).smallest_normal
    with np.errstate(invalid="ignore"):  # bfloat16 warns about NaN
        flushed = ((a == 0) & (b < smallest_normal)) | ((b == 0) & (a < smallest_normal))
        found: np.ndarray = ((a == b) | flushed).all(axis=1) & (a != b).any(axis=1)
    return found
