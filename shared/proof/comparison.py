"""What was found where two arrays differ, gathered some rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.bits import ulp_distance, unsigned_view
from shared.partition import VocabPartition
from shared.proof.classify import Side, held_rows, rows_at_once

__all__ = ["Comparison", "Differences", "DifferingRow"]

_EXAMPLES = 5


@dataclass(frozen=True)
class DifferingRow:
    """One row that differs.

    Attributes:
        index: forward: the position in the ids, of all ranks together; else the row of the whole table.
        id: the id looked up there.
        owner: the rank that owns the id; -1 for ids outside the vocabulary.
        kind: one of ``shared.proof.classify.KINDS``.
        max_ulp: the largest distance of two elements; None where none can be told, for NaN.
        note: which other row a side holds, where that is the difference.
    """

    index: tuple[int, ...]
    id: int
    owner: int
    kind: str
    max_ulp: float | None
    note: str


@dataclass(frozen=True)
class Comparison:
    """One array of one side against the same array of the other.

    Attributes:
        left, right: the sides' names.
        what: the array: ``"forward"``, ``"gradient"``, ``"table"``.
        rank: whose; None for the sum over all ranks (of anything but forward: the whole table's).
        rows: rows compared.
        nonzero: how many of them the left side has that are not zero in every bit.
        differing: rows that are not equal in every bit.
        max_ulp, max_abs: over all elements that are not NaN on either side.
        kinds: how many of the differing rows look like what; the most frequent first.
        ulps: how many elements differ by how many representable values. The keys ``"1"``, ``"2"``, ``"4"``, ``"8"`` and
            so on count the distances from that power of two to below the next. ``"0"`` counts those that differ by the
            sign of zero, ``"NaN"`` those where a side is NaN.
        examples: the first few differing rows of each kind.
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


class Differences:
    """The differing rows of one array, added some at a time."""

    def __init__(self, names: tuple[str, str], partition: VocabPartition) -> None:
        self._names, self._partition = names, partition
        self._max_ulp = self._max_abs = 0.0
        self._kinds: Counter[str] = Counter()
        self._ulps: Counter[str] = Counter()
        self._examples: list[DifferingRow] = []

    def add(
        self, ids: np.ndarray, index_of: Callable[[int], tuple[Any, ...]], sides: tuple[Side, Side], kinds: np.ndarray
    ) -> None:
        """Add rows, ``[k, e]`` on each side.

        Args:
            ids: the id that each row belongs to, ``[k]``.
            index_of: where one of these rows is, counted from 0.
            sides: the rows as both sides have them.
            kinds: what ``shared.proof.classify.classify`` calls them.
        """
        ulp, absolute, ulps = _distances(sides[0].values, sides[1].values)
        self._max_ulp = max(self._max_ulp, float(np.nanmax(ulp, initial=0)))
        self._max_abs = max(self._max_abs, float(np.nanmax(absolute, initial=0)))
        shown = np.sort(np.concatenate([np.flatnonzero(kinds == kind)[:_EXAMPLES] for kind in set(kinds)] or [ids[:0]]))
        held = [held_rows(ids[shown], Side(side.values[shown], side.reference)) for side in sides]
        for i, *rows in zip(map(int, shown), *held, strict=True):
            notes = [
                f"{name} has row {row}" for name, row in zip(self._names, rows, strict=True) if row not in (-1, ids[i])
            ]
            example = DifferingRow(
                index=tuple(map(int, index_of(i))),
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
        if sum(kept.kind == example.kind for kept in self._examples) < _EXAMPLES:
            self._examples.append(example)

    def merge(self, other: Differences) -> None:
        """Add what another part of the array gathered."""
        self._max_ulp = max(self._max_ulp, other._max_ulp)
        self._max_abs = max(self._max_abs, other._max_abs)
        self._kinds.update(other._kinds)
        self._ulps.update(other._ulps)
        for example in other._examples:
            self._keep(example)

    def comparison(self, what: str, rank: int | None, rows: int, nonzero: int) -> Comparison:
        """All of it as the comparison of ``rows`` rows."""
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
    """Each row's largest distance in representable values and in value, and all differing elements' distances.

    A row of which no element can be compared has NaN. The third is ``Comparison.ulps``.
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
    # frexp of 0 is 0, of [2**k, 2**(k + 1)) is k + 1; distances stay below 2**65.
    names = ["0", *(str(2**k) for k in range(65)), "NaN"]
    return ulp, absolute, Counter({name: int(count) for name, count in zip(names, bins, strict=True) if count})
