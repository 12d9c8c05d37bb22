"""Differing rows of two arrays, and their summary."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from shared.bits import ulp_distance, unsigned_view
from shared.partition import VocabPartition
from shared.proof.classify import Differing, classify

__all__ = ["Comparison", "DifferingRow", "Distances", "combined", "describe", "distances", "number"]

_BY_POSITION = ("forward", "logprobs", "hidden gradient", "argmax")
_EXAMPLES = 5
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
        numbers, id_ = ", ".join(map(str, self.index)), f"id {self.id}"
        owner = "no rank's" if self.owner < 0 else f"rank {self.owner}'s"
        place = f"position {numbers}" if what in _BY_POSITION else f"row {numbers}"
        if self.kind == "ranks disagree":
            place, id_, owner, ulp = f"rank {numbers}", "", "", ""
        elif what == "loss":
            place, id_, owner = "the loss", "", ""
        elif what in _BY_POSITION[1:]:
            id_, owner = (f"target {self.id}", owner) if self.id >= 0 else ("no target", "")
        return place, id_, owner, self.kind, "" if what == "argmax" else ulp, self.note


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

    def with_differing(
        self,
        partition: VocabPartition,
        kinds: np.ndarray,
        found: "Distances",
        place: Callable[[int], tuple[Iterable[Any], int, str]],
    ) -> Self:
        """Add counts, distances and examples of k rows, some of them equal.

        ``kinds`` ``[k]`` are empty text for equal rows. ``place`` gives position, id and note of a row.
        """
        counts = Counter(kinds[kinds != ""].tolist())
        examples = []
        for i in sorted(int(i) for kind in counts for i in np.flatnonzero(kinds == kind)[:_EXAMPLES]):
            index, id_, note = place(i)
            ulp, owner = None if np.isnan(found.ulp[i]) else float(found.ulp[i]), int(partition.owner(id_))
            examples.append(DifferingRow(tuple(map(int, index)), int(id_), owner, kinds[i], ulp, note))
        return replace(
            self,
            differing=counts.total(),
            max_ulp=float(np.nanmax(found.ulp, initial=0)),
            max_abs=float(np.nanmax(found.absolute, initial=0)),
            kinds=dict(counts.most_common()),
            ulps=found.ulps,
            examples=tuple(examples),
        )


def number(distance: float) -> str:
    """Format a distance."""
    return f"{distance:.0f}" if abs(distance) < 1e6 and distance == round(distance) else f"{distance:.3g}"


def describe(
    equal: Comparison, rows: Differing, partition: VocabPartition, padding_idx: int | None = None
) -> Comparison:
    """Classify differing rows and add them to a comparison."""
    elements = ulp_distance(*rows.values)
    held = classify(rows, elements, partition, padding_idx)

    def place(i: int) -> tuple[Iterable[int], int, str]:
        id_, sides = rows.ids[i], zip((equal.left, equal.right), held[:, i], strict=True)
        return rows.index[i], id_, "; ".join(f"{name} has row {row}" for name, row in sides if row not in (-1, id_))

    return equal.with_differing(partition, rows.kinds, distances(*rows.values, elements), place)


def combined(sides: tuple[str, str], what: str, rank: int | None, parts: Sequence[Comparison]) -> Comparison:
    """Comparison of all rows of several parts of one array."""
    kinds, ulps, shown = Counter[str](), Counter[str](), Counter[str]()
    examples = []
    for part in parts:
        kinds.update(part.kinds)
        ulps.update(part.ulps)
        for row in part.examples:
            shown[row.kind] += 1
            if shown[row.kind] <= _EXAMPLES:
                examples.append(row)
    whole: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts) for name in ("rows", "nonzero", "differing")
    }
    for name in ("max_ulp", "max_abs", "bound", "share"):
        whole[name] = max((getattr(part, name) for part in parts), default=0.0)
    whole["ulps"] = dict(sorted(ulps.items(), key=lambda each: float(each[0].replace("NaN", "inf"))))
    whole |= {"kinds": dict(kinds.most_common()), "examples": tuple(examples)}
    return Comparison(*sides, what, rank, **whole)


class Distances(NamedTuple):
    """Largest distances by row, and ``Comparison.ulps``.

    A row whose elements are all NaN on a side has distance NaN.
    """

    ulp: np.ndarray
    absolute: np.ndarray
    ulps: dict[str, int]


def distances(a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> Distances:
    """Measure rows ``[k, e]``, given the ULP distances of their elements."""
    with np.errstate(invalid="ignore"):  # infinity minus itself
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    comparable = ~np.isnan(distance)
    none = ~comparable.any(axis=1)
    ulp = np.where(none, np.nan, np.max(distance, axis=1, where=comparable, initial=0))
    finite = comparable & ~np.isnan(difference)
    absolute = np.where(none, np.nan, np.max(difference, axis=1, where=finite, initial=0))
    unequal = distance[unsigned_view(a) != unsigned_view(b)]
    # frexp's exponent is 0 for 0 and k + 1 for [2**k, 2**(k + 1)); distances stay below 2**65.
    bins = np.bincount(np.where(np.isnan(unequal), 66, np.frexp(unequal)[1]), minlength=67)
    names = ["0", *(str(2**k) for k in range(65)), "NaN"]
    ulps = {name: int(count) for name, count in zip(names, bins, strict=True) if count}
    return Distances(ulp, absolute, ulps)
