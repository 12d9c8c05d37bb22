"""Differing rows of two arrays, gathered batch by batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from shared.bits import ulp_distance, unsigned_view
from shared.partition import VocabPartition
from shared.proof.classify import Side, held_rows, rows_at_once

__all__ = ["EXAMPLES", "Comparison", "Differences", "DifferingRow"]

EXAMPLES = 5
"""Most rows of a kind that are listed."""


@dataclass(frozen=True)
class DifferingRow:
    """One row that differs.

    Attributes:
        index: position in the whole ids (forward), or row of the whole table.
        id: id of the row, or target of the token.
        owner: rank that owns the id; -1 for ids outside the vocabulary.
        kind: one of ``shared.proof.classify.KINDS`` or ``shared.proof.head_diff.HEAD_KINDS``.
        max_ulp: largest distance of two elements; None if every element is NaN on a side.
        note: the other row that a side holds, if any; of a head, which rank or target is wrong.
    """

    index: tuple[int, ...]
    id: int
    owner: int
    kind: str
    max_ulp: float | None
    note: str


@dataclass(frozen=True)
class Comparison:
    """Result of comparing one array of two sides.

    Attributes:
        left, right: names of the sides.
        what: name of the array: ``"forward"``, ``"gradient"``, ``"table"``, or one of ``shared.proof.head_record.ARRAYS``.
        rank: rank of the array; None for the sum (forward) or the whole table. Of the head's results that all ranks have,
            None compares the ranks with each other.
        rows: rows compared.
        nonzero: rows of the left side with any nonzero bit.
        differing: rows with any differing bit; where there is a bound, with an element beyond it.
        max_ulp, max_abs: largest distances, over elements that are NaN on neither side.
        kinds: number of differing rows of each kind, most frequent first.
        ulps: histogram of the distances of differing elements, in representable values. Key ``"4"`` counts distances in
            [4, 8), and so for each power of two. ``"0"`` counts differing signs of zero, ``"NaN"`` NaN on a side.
        examples: first differing rows of each kind.
        bound: largest error that is allowed; 0 where every bit must be equal.
        share: largest error of an element divided by its bound.
    """

    left: str
    right: str
    what: str
    rank: int | None
    rows: int
    nonzero: int
    differing: int = 0
    max_ulp: float = 0.0
    max_abs: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    ulps: dict[str, int] = field(default_factory=dict)
    examples: tuple[DifferingRow, ...] = ()
    bound: float = 0.0
    share: float = 0.0


class Differences:
    """Accumulator of the differing rows of one array."""

    def __init__(self, names: tuple[str, str], partition: VocabPartition) -> None:
        self._names, self._partition = names, partition
        self._max_ulp = self._max_abs = 0.0
        self._kinds: Counter[str] = Counter()
        self._ulps: Counter[str] = Counter()
        self._examples: list[DifferingRow] = []

    def add(self, ids: np.ndarray, index: np.ndarray, sides: tuple[Side, Side], kinds: np.ndarray) -> None:
        """Add differing rows.

        Args:
            ids: id of each row, ``[k]``.
            index: position of each row, ``[k, d]``, as ``DifferingRow.index``.
            sides: the rows of both sides, ``[k, e]``.
            kinds: kind of each row, ``[k]``, from ``classify``.
        """
        ulp, absolute, ulps = _distances(sides[0].values, sides[1].values)
        self._max_ulp = max(self._max_ulp, float(np.nanmax(ulp, initial=0)))
        self._max_abs = max(self._max_abs, float(np.nanmax(absolute, initial=0)))
        shown = np.sort(np.concatenate([np.flatnonzero(kinds == kind)[:EXAMPLES] for kind in set(kinds)] or [ids[:0]]))
        held = [held_rows(ids[shown], Side(side.values[shown], side.reference)) for side in sides]
        for i, *rows in zip(map(int, shown), *held, strict=True):
            notes = [
                f"{name} has row {row}" for name, row in zip(self._names, rows, strict=True) if row not in (-1, ids[i])
            ]
            example = DifferingRow(
                index=tuple(map(int, index[i])),
                id=int(ids[i]),
                owner=int(self._partition.owner(ids[i])),
                kind=str(kinds[i]),
                max_ulp=None if np.isnan(ulp[i]) else float(ulp[i]),
                note="; ".join(notes),
            )
            self._keep(example)
        self._kinds.update(map(str, kinds))
        self._ulps.update(ulps)

    def _keep(self, example: DifferingRow) -> None:
        if sum(kept.kind == example.kind for kept in self._examples) < EXAMPLES:
            self._examples.append(example)

    def merge(self, other: Differences) -> None:
        """Add the differences of another part of the array."""
        self._max_ulp = max(self._max_ulp, other._max_ulp)
        self._max_abs = max(self._max_abs, other._max_abs)
        self._kinds.update(other._kinds)
        self._ulps.update(other._ulps)
        for example in other._examples:
            self._keep(example)

    def comparison(self, what: str, rank: int | None, rows: int, nonzero: int) -> Comparison:
        """Summarise as a comparison of ``rows`` rows."""
        return Comparison(
            *self._names,
            what=what,
            rank=rank,
            rows=rows,
            nonzero=nonzero,
            differing=self._kinds.total(),
            max_ulp=self._max_ulp,
            max_abs=self._max_abs,
            kinds=dict(self._kinds.most_common()),
            ulps=dict(sorted(self._ulps.items(), key=lambda bin: float(bin[0]) if bin[0] != "NaN" else np.inf)),
            examples=tuple(self._examples),
        )


def _distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Largest ULP and absolute distance of each row, and ``Comparison.ulps``.

    A row whose elements are all NaN on a side has distance NaN.
    """
    ulp, absolute, bins = np.empty(len(a)), np.empty(len(a)), np.zeros(67, np.int64)
    step = rows_at_once(a)
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        distance = ulp_distance(a[part], b[part])
        with np.errstate(invalid="ignore"):  # infinity minus itself
            difference = np.abs(a[part].astype(np.float64) - b[part].astype(np.float64))
        comparable = ~np.isnan(distance)
        none = ~comparable.any(axis=1)
        ulp[part] = np.where(none, np.nan, np.max(distance, axis=1, where=comparable, initial=0))
        finite = comparable & ~np.isnan(difference)
        absolute[part] = np.where(none, np.nan, np.max(difference, axis=1, where=finite, initial=0))
        unequal = distance[unsigned_view(a[part]) != unsigned_view(b[part])]
        bins += np.bincount(np.where(np.isnan(unequal), 66, np.frexp(unequal)[1]), minlength=67)
    # frexp's exponent is 0 for 0 and k + 1 for [2**k, 2**(k + 1)); distances stay below 2**65.
    names = ["0", *(str(2**k) for k in range(65)), "NaN"]
    return ulp, absolute, Counter({name: int(count) for name, count in zip(names, bins, strict=True) if count})
