"""Results of a comparison, for terminal, JSON, Markdown and HTML."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shared.partition import VocabPartition
from shared.proof.case import CaseFacts
from shared.proof.classify import KINDS
from shared.proof.comparison import Comparison

__all__ = ["Pair", "Report", "Versions", "case_report", "sizes"]

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

    def result(self, rank: int | None) -> str:
        """``equal``, or how many rows of each array differ."""
        different = [f"{part.what} {part.differing}" for part in self.ranks[rank] if part.differing]
        return f"differ: {', '.join(different)}" if different else "equal"


@dataclass(frozen=True)
class Report:
    """Result of a comparison, and what was compared.

    ``title`` holds the sizes, ``notes`` are further facts about the input, ``sides`` facts of each side by its name, and
    ``facts`` further fields of the JSON form. ``arrays`` has for each array compared the heading for its number of nonzero
    rows, empty to leave this number out. ``missing`` are backends that are not installed.
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
    def different(self) -> list[Comparison]:
        """Comparisons that found a difference."""
        return [comparison for comparison in self.comparisons if comparison.differing]

    @property
    def meanings(self) -> dict[str, str]:
        """Kinds of difference that were found, and their meaning."""
        return {kind: self.kinds[kind] for comparison in self.different for kind in comparison.kinds}

    @property
    def verdict(self) -> str:
        """EQUAL or DIFFERENT, with totals, in one line."""
        time = "" if self.seconds is None else f" ({self.seconds:.1f} s)"
        if self.different:
            return f"DIFFERENT: {len(self.different)} of {len(self.comparisons)} comparisons{time}"
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

    def heading(self, part: Comparison) -> str:
        """Sides, array and rank of a comparison, in words."""
        rank = self.rank_cells(part.rank)[0]
        return f"{part.left} against {part.right}, {part.what}, {rank if part.rank is None else f'rank {rank}'}"

    def overview(self, counts: bool) -> list[list[str]]:
        """Table of results: a header, then one row per rank."""
        pairs = self.pairs()
        counted = {what: heading for what, heading in self.arrays.items() if heading and counts}
        table = [["rank", "owns ids", *counted.values(), *(f"{pair.left} = {pair.right}" for pair in pairs)]]
        for rank, parts in pairs[0].ranks.items():
            nonzero = [f"{part.nonzero} of {part.rows}" for part in parts if part.what in counted]
            table.append([*self.rank_cells(rank), *nonzero, *(pair.result(rank) for pair in pairs)])
        return table

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
    return Report(
        title=f"{sizes(case)}, ids {shape}{how}",
        notes=(case.source, f"{outside} of {ids.size} ids are outside the vocabulary [0, {case.vocab_size})"),
        sides=versions,
        partition=case.partition,
        arrays={"forward": "looked up" if case.reduction == "none" else "returns", "gradient": "with gradient"},
        comparisons=comparisons,
        facts={"case": case.facts, "ids_outside": outside, "backends": versions, "missing": list(missing)},
        missing=missing,
        seconds=seconds,
    )


def sizes(case: CaseFacts) -> str:
    """Sizes of a case's table and its ranks, in words."""
    padded = f" (padded to {case.padded_vocab_size})" if case.partition.padding_rows else ""
    return f"{case.vocab_size} x {case.emb_size} {case.dtype} over {case.world_size} ranks{padded}"
