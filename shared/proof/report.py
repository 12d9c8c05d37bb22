"""What a comparison came to, as plain data; the terminal, JSON, Markdown and HTML show it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shared.partition import VocabPartition
from shared.proof.case import CaseFacts
from shared.proof.comparison import Comparison, DifferingRow

__all__ = ["Pair", "Report", "case_report", "describe_number", "describe_row"]

Versions = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Pair:
    """The comparisons of two sides.

    Attributes:
        left, right: the sides' names.
        ranks: for each rank, and last for all of them together (None), the comparison of each array.
    """

    left: str
    right: str
    ranks: dict[int | None, list[Comparison]]

    def of_array(self, what: str) -> list[Comparison]:
        """The comparisons of one array."""
        return [comparison for found in self.ranks.values() for comparison in found if comparison.what == what]


@dataclass(frozen=True)
class Report:
    """What was compared and what came out.

    Attributes:
        title: the sizes, in a line.
        notes: what else there is to know of what was compared.
        sides: facts of each side, by its name.
        partition: which rank owns which rows.
        arrays: the arrays that were compared, and what a row of each that is not zero is called.
        comparisons: of every array of every rank of every pair of sides.
        facts: what JSON has besides.
        missing: backends that are not installed.
        seconds: how long it took, where that is of interest.
    """

    title: str
    notes: tuple[str, ...]
    sides: Versions
    partition: VocabPartition
    arrays: dict[str, str]
    comparisons: Sequence[Comparison]
    facts: dict[str, Any]
    missing: Sequence[str] = ()
    seconds: float | None = field(default=None, compare=False)

    @property
    def different(self) -> int:
        """How many comparisons found a difference."""
        return sum(comparison.differing > 0 for comparison in self.comparisons)

    @property
    def verdict(self) -> str:
        """EQUAL or DIFFERENT, and of how much."""
        time = "" if self.seconds is None else f" ({self.seconds:.1f} s)"
        if self.different:
            return f"DIFFERENT: {self.different} of {len(self.comparisons)} comparisons{time}"
        rows = sum(comparison.rows for comparison in self.comparisons)
        return f"EQUAL: {len(self.comparisons)} comparisons of {rows} rows in all, max ULP 0, max abs 0{time}"

    @property
    def advice(self) -> list[str]:
        """What to install for a whole comparison."""
        return [
            f"{name} is not installed, so its layer was not run: pip install 'parallel-vocab-embedding[{name}]'"
            for name in self.missing
        ]

    def pairs(self) -> list[Pair]:
        """The comparisons by pair of sides, then by rank."""
        pairs = []
        for (left, right), group in itertools.groupby(self.comparisons, key=lambda c: (c.left, c.right)):
            ranks: dict[int | None, list[Comparison]] = {}
            for comparison in group:
                ranks.setdefault(comparison.rank, []).append(comparison)
            pairs.append(Pair(left, right, ranks))
        return pairs

    def rank_cells(self, rank: int | None) -> tuple[str, str]:
        """The name of a rank, or of all of them together, and the ids that it owns."""
        label = "sum" if "forward" in self.arrays else "all"
        start, stop = (0, self.partition.vocab_size) if rank is None else self.partition.owned_range(rank)
        return label if rank is None else str(rank), f"{start} - {stop - 1}" if start < stop else "none"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values. Distances without a finite number are strings, as in ``"inf"``."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [plain(item) for item in value]
            return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

        comparisons = [plain(asdict(comparison)) for comparison in self.comparisons]
        return {"equal": not self.different, **self.facts, "comparisons": comparisons}


def case_report(
    case: CaseFacts,
    ids: np.ndarray,
    versions: Versions,
    comparisons: Sequence[Comparison],
    missing: Sequence[str] = (),
    seconds: float | None = None,
) -> Report:
    """The report of backends that computed one case; ``ids`` are the case's."""
    outside = int((~np.asarray(case.partition.is_valid(ids))).sum())
    shape = "x".join(map(str, case.ids_shape)) or "one"
    how = "" if case.reduction == "none" else f", {case.reduction} ({case.exchange})"
    padded = f" (padded to {case.padded_vocab_size})" if case.partition.padding_rows else ""
    sizes = f"{case.vocab_size} x {case.emb_size} {case.dtype} over {case.world_size} ranks{padded}"
    return Report(
        title=f"{sizes}, ids {shape}{how}",
        notes=(case.source, f"{outside} of {ids.size} ids are outside the vocabulary [0, {case.vocab_size})"),
        sides=versions,
        partition=case.partition,
        arrays={"forward": "looked up" if case.reduction == "none" else "returns", "gradient": "with gradient"},
        comparisons=comparisons,
        facts={
            "case": case.facts,
            "ids_outside": outside,
            "backends": versions,
            "missing": list(missing),
        },
        missing=missing,
        seconds=seconds,
    )


def describe_number(value: float) -> str:
    """A distance, short."""
    return f"{value:.0f}" if abs(value) < 1e6 and value == round(value) else f"{value:.3g}"


def describe_row(what: str, row: DifferingRow) -> tuple[str, str, str, str, str, str]:
    """Where a differing row is, its id, its owner, what it looks like, how far apart the sides are, and the note."""
    place = "position" if what == "forward" else "row"
    owner = "no rank's" if row.owner < 0 else f"rank {row.owner}'s"
    ulp = "NaN" if row.max_ulp is None else f"{describe_number(row.max_ulp)} ULP"
    return f"{place} {', '.join(map(str, row.index))}", f"id {row.id}", owner, row.kind, ulp, row.note
