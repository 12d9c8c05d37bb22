"""Results of a comparison, for terminal, JSON, Markdown and HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shared.partition import VocabPartition
from shared.proof.case import CaseFacts
from shared.proof.classify import KINDS
from shared.proof.comparison import Comparison

__all__ = ["Report", "Versions", "case_report", "sizes"]

Versions = dict[str, dict[str, str]]


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
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)
    missing: Sequence[str] = ()
    seconds: float | None = None

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
    def side_lines(self) -> list[str]:
        """Name and facts of each side, in one line."""
        sides = self.sides.items()
        return [f"{side}: {', '.join(f'{name} {value}' for name, value in facts.items())}" for side, facts in sides]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of sides that were compared."""
        return list(dict.fromkeys((part.left, part.right) for part in self.comparisons))

    def rank_cells(self, rank: int | None) -> tuple[str, str]:
        """Label and owned ids of a rank; None for all ranks."""
        label = "sum" if "forward" in self.arrays else "all"
        start, stop = (0, self.partition.vocab_size) if rank is None else self.partition.owned_range(rank)
        return label if rank is None else str(rank), f"{start} - {stop - 1}" if start < stop else "none"

    def heading(self, part: Comparison) -> str:
        """Sides, array and rank of a comparison, in words."""
        rank = self.rank_cells(part.rank)[0]
        return f"{part.left} against {part.right}, {part.what}, {rank if part.rank is None else f'rank {rank}'}"

    def overview(self) -> list[list[str]]:
        """Table of results: a header, then one row per rank."""
        counted = [what for what, heading in self.arrays.items() if heading]
        header = ["rank", "owns ids", *(self.arrays[what] for what in counted)]
        table = [header + [f"{left} = {right}" for left, right in self.pairs]]
        for rank in dict.fromkeys(part.rank for part in self.comparisons):
            parts = [part for part in self.comparisons if part.rank == rank]
            of_first = [part for part in parts if (part.left, part.right) == self.pairs[0]]
            nonzero = [f"{part.nonzero} of {part.rows}" for part in of_first if part.what in counted]
            results = []
            for pair in self.pairs:
                different = [part for part in parts if (part.left, part.right) == pair and part.differing]
                rows = ", ".join(f"{part.what} {part.differing}" for part in different)
                results.append(f"differ: {rows}" if different else "equal")
            table.append([*self.rank_cells(rank), *nonzero, *results])
        return table

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values; infinite distances become strings."""
        comparisons = [
            {name: str(value) if value == math.inf else value for name, value in asdict(part).items()}
            for part in self.comparisons
        ]
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
    how = "" if case.reduction == "none" else f", {case.reduction} ({case.exchange})"
    return Report(
        title=f"{sizes(case, 'ids')}{how}",
        notes=(case.source, f"{outside} of {ids.size} ids are outside the vocabulary [0, {case.vocab_size})"),
        sides=versions,
        partition=case.partition,
        arrays={"forward": "looked up" if case.reduction == "none" else "returns", "gradient": "with gradient"},
        comparisons=comparisons,
        facts={"case": case.facts, "ids_outside": outside, "backends": versions, "missing": list(missing)},
        missing=missing,
        seconds=seconds,
    )


def sizes(case: CaseFacts, name: str) -> str:
    """Sizes of a case's table, ranks and ids, in words."""
    padded = f" (padded to {case.padded_vocab_size})" if case.partition.padding_rows else ""
    shape = "x".join(map(str, case.ids_shape)) or "one"
    return f"{case.vocab_size} x {case.emb_size} {case.dtype} over {case.world_size} ranks{padded}, {name} {shape}"
