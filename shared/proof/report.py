"""Results of a comparison, for terminal, JSON, Markdown and HTML."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shared.partition import VocabPartition
from shared.proof.case import CaseFacts
from shared.proof.classify import KINDS
from shared.proof.comparison import Comparison, DifferingRow

__all__ = [
    "Pair",
    "Report",
    "Versions",
    "case_report",
    "describe_kinds",
    "describe_number",
    "describe_parts",
    "describe_row",
]

Versions = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Pair:
    """Comparisons of two sides by rank; None for all ranks together."""

    left: str
    right: str
    ranks: dict[int | None, list[Comparison]]

    def of_array(self, what: str) -> list[Comparison]:
        """Comparisons of one array."""
        return [comparison for found in self.ranks.values() for comparison in found if comparison.what == what]


@dataclass(frozen=True)
class Report:
    """Result of a comparison, and what was compared.

    Attributes:
        title: sizes, in one line.
        notes: further facts about the input.
        sides: facts of each side, by its name.
        partition: ownership of the rows.
        arrays: for each array compared, the heading for its number of nonzero rows; empty to leave this number out.
        comparisons: of each array, rank and pair of sides.
        facts: further fields of the JSON form.
        missing: backends that are not installed.
        kinds: kinds of difference and their meaning.
        seconds: time taken.
    """

    title: str
    notes: tuple[str, ...]
    sides: Versions
    partition: VocabPartition
    arrays: dict[str, str]
    comparisons: Sequence[Comparison]
    facts: dict[str, Any]
    missing: Sequence[str] = ()
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    seconds: float | None = field(default=None, compare=False)

    @property
    def different(self) -> int:
        """Number of comparisons that found a difference."""
        return sum(comparison.differing > 0 for comparison in self.comparisons)

    @property
    def verdict(self) -> str:
        """EQUAL or DIFFERENT, with totals, in one line."""
        time = "" if self.seconds is None else f" ({self.seconds:.1f} s)"
        if self.different:
            return f"DIFFERENT: {self.different} of {len(self.comparisons)} comparisons{time}"
        rows = sum(comparison.rows for comparison in self.comparisons)
        equal = f"EQUAL: {len(self.comparisons)} comparisons of {rows} rows in all"
        if any(comparison.bound for comparison in self.comparisons):
            share = max(comparison.share for comparison in self.comparisons)
            return f"{equal}, errors at most {share:.2f} of their bounds{time}"
        return f"{equal}, max ULP 0, max abs 0{time}"

    @property
    def advice(self) -> list[str]:
        """How to install the missing backends."""
        return [
            f"{name} is not installed, so its layer was not run: pip install 'parallel-vocab-embedding[{name}]'"
            for name in self.missing
        ]

    @property
    def side_lines(self) -> dict[str, str]:
        """Facts of each side in one line, by its name."""
        return {
            side: ", ".join(f"{name} {value}" for name, value in facts.items()) for side, facts in self.sides.items()
        }

    def pairs(self) -> list[Pair]:
        """Group the comparisons by pair of sides, then by rank."""
        pairs = []
        for (left, right), group in itertools.groupby(self.comparisons, key=lambda c: (c.left, c.right)):
            ranks: dict[int | None, list[Comparison]] = {}
            for comparison in group:
                ranks.setdefault(comparison.rank, []).append(comparison)
            pairs.append(Pair(left, right, ranks))
        return pairs

    def rank_cells(self, rank: int | None) -> tuple[str, str]:
        """Label and owned ids of a rank; None for all ranks."""
        label = "sum" if "forward" in self.arrays else "all"
        start, stop = (0, self.partition.vocab_size) if rank is None else self.partition.owned_range(rank)
        return label if rank is None else str(rank), f"{start} - {stop - 1}" if start < stop else "none"

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values; infinite distances become strings."""

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
    """Report on backends that computed one case, with these ids."""
    outside = int((~case.partition.is_valid(ids)).sum())
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
        facts={"case": case.facts, "ids_outside": outside, "backends": versions, "missing": list(missing)},
        missing=missing,
        seconds=seconds,
    )


def describe_parts(comparisons: Sequence[Comparison]) -> str:
    """``equal``, or the number of differing rows of each array."""
    different = [f"{part.what} {part.differing}" for part in comparisons if part.differing]
    return f"differ: {', '.join(different)}" if different else "equal"


def describe_kinds(comparison: Comparison) -> str:
    """Number of differing rows of each kind."""
    return ", ".join(f"{count} {kind}" for kind, count in comparison.kinds.items())


def describe_number(value: float) -> str:
    """Format a distance."""
    return f"{value:.0f}" if abs(value) < 1e6 and value == round(value) else f"{value:.3g}"


def describe_row(what: str, row: DifferingRow) -> tuple[str, str, str, str, str, str]:
    """Describe a differing row: position, id, owner, kind, distance, note."""
    ulp = "NaN" if row.max_ulp is None else f"{describe_number(row.max_ulp)} ULP"
    owner = "no rank's" if row.owner < 0 else f"rank {row.owner}'s"
    numbers = ", ".join(map(str, row.index))
    if row.kind == "ranks disagree":
        return f"rank {numbers}", "", "", row.kind, "", row.note
    if what == "loss":
        return "the loss", "", "", row.kind, ulp, row.note
    if what in ("logprobs", "hidden gradient", "argmax"):
        target = ("no target", "") if row.id < 0 else (f"target {row.id}", owner)
        return f"position {numbers}", *target, row.kind, "" if what == "argmax" else ulp, row.note
    place = "position" if what == "forward" else "row"
    return f"{place} {numbers}", f"id {row.id}", owner, row.kind, ulp, row.note
