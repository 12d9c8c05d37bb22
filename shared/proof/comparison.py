"""Differing rows of two arrays, gathered batch by batch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from shared.bits import ulp_distance, unsigned_view
from shared.partition import VocabPartition
from shared.proof.classify import Side, held_rows, rows_at_once

__all__ = ["EXAMPLES", "Comparison", "Differences", "DifferingRow", "distances", "first_of_each_kind", "number"]

EXAMPLES = 5
"""Most rows of a kind that are listed."""


@dataclass(frozen=True)
class DifferingRow:
    """One row that differs.

    ``schema.json`` of the command describes the fields. ``kind`` is one of ``shared.proof.classify.KINDS`` or
    ``shared.proof.head_diff.HEAD_KINDS``. ``note`` names the other row that a side holds, if any; of a head, the rank or
    target that is wrong.
    """

    index: tuple[int, ...]
    id: int
    owner: int
    kind: str
    max_ulp: float | None
    note: str

    def cells(self, what: str) -> tuple[str, str, str, str, str, str]:
        """Position, id, owner, kind, distance and note, in words."""
        ulp = "NaN" if self.max_ulp is None else f"{number(self.max_ulp)} ULP"
        owner = "no rank's" if self.owner < 0 else f"rank {self.owner}'s"
        numbers = ", ".join(map(str, self.index))
        if self.kind == "ranks disagree":
            return f"rank {numbers}", "", "", self.kind, "", self.note
        if what == "loss":
            return "the loss", "", "", self.kind, ulp, self.note
        if what in ("logprobs", "hidden gradient", "argmax"):
            target = ("no target", "") if self.id < 0 else (f"target {self.id}", owner)
            return f"position {numbers}", *target, self.kind, "" if what == "argmax" else ulp, self.note
        place = "position" if what == "forward" else "row"
        return f"{place} {numbers}", f"id {self.id}", owner, self.kind, ulp, self.note


@dataclass(frozen=True)
class Comparison:
    """Result of comparing one array of two sides.

    ``schema.json`` of the command describes the fields. ``nonzero`` counts rows of the left side with any nonzero bit.
    ``max_ulp`` and ``max_abs`` leave out elements that are NaN on a side. ``kinds`` has the most frequent kind first,
    ``examples`` the first differing rows of each.
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

    @property
    def counts(self) -> str:
        """Number of differing rows of each kind, in words."""
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())


def number(distance: float) -> str:
    """Format a distance."""
    return f"{distance:.0f}" if abs(distance) < 1e6 and distance == round(distance) else f"{distance:.3g}"


class Differences:
    """Accumulator of the differing rows of one array."""

    def __init__(self, names: tuple[str, str], partition: VocabPartition) -> None:
        self._names, self._partition = names, partition
        self._max_ulp = self._max_abs = 0.0
        self._kinds: Counter[str] = Counter()
        self._ulps: Counter[str] = Counter()
        self._examples: list[DifferingRow] = []

    def add(self, ids: np.ndarray, index: np.ndarray, sides: tuple[Side, Side], kinds: np.ndarray) -> None:
        """Add rows: ids ``[k]``, positions ``[k, d]``, values, kinds ``[k]``."""
        ulp, absolute, ulps = distances(sides[0].values, sides[1].values)
        self._max_ulp = max(self._max_ulp, float(np.nanmax(ulp, initial=0)))
        self._max_abs = max(self._max_abs, float(np.nanmax(absolute, initial=0)))
        shown = first_of_each_kind(kinds)
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

    def merge(self, other: Self) -> None:
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


def first_of_each_kind(kinds: np.ndarray) -> np.ndarray:
    """Indices of the first ``EXAMPLES`` rows of each kind, ascending."""
    found = (np.flatnonzero(kinds == kind)[:EXAMPLES] for kind in set(kinds))
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


def distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
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
