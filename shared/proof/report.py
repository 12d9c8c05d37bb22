"""How a comparison is shown: as tables on a terminal, or as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.proof.case import CaseFacts
from shared.proof.classify import KINDS
from shared.proof.diff import Comparison

__all__ = ["as_json", "print_report"]

_SHOWN = 3
Versions = dict[str, dict[str, str]]


def as_json(
    case: CaseFacts, versions: Versions, comparisons: Sequence[Comparison], missing: Sequence[str]
) -> dict[str, Any]:
    """A comparison as plain values. Distances without a finite number are strings, as in ``"inf"``."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

    return {
        "equal": not any(comparison.differing for comparison in comparisons),
        "case": case.facts,
        "backends": versions,
        "missing": list(missing),
        "comparisons": [plain(asdict(comparison)) for comparison in comparisons],
    }


def print_report(
    console: Console,
    case: CaseFacts,
    versions: Versions,
    comparisons: Sequence[Comparison],
    missing: Sequence[str],
    seconds: float | None = None,
) -> None:
    """Print what was compared, a table of the results, the differing rows, and the verdict."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    ids = "x".join(map(str, case.ids_shape)) or "one"
    how = "" if case.reduction == "none" else f", {case.reduction} ({case.exchange})"
    rows = case.partition.padding_rows
    padded = f" (padded to {case.padded_vocab_size})" if rows else ""
    say(
        f"{case.vocab_size} x {case.emb_size} {case.dtype} over {case.world_size} ranks{padded}, ids {ids}{how}", "bold"
    )
    say(case.source)
    for name, found in versions.items():
        say(f"  {name}: " + ", ".join(f"{package} {version}" for package, version in found.items()), "dim")
    pairs = [list(group) for _, group in itertools.groupby(comparisons, key=lambda c: (c.left, c.right))]
    console.print(_overview(case, pairs))
    kinds: dict[str, None] = {}
    for comparison in comparisons:
        if comparison.differing:
            say(_heading(comparison), "bold")
            console.print(_rows(comparison))
            kinds |= dict.fromkeys(comparison.kinds)
    for kind in kinds:
        say(f"{kind}: {KINDS[kind]}", "dim")
    for name in missing:
        say(
            f"{name} is not installed, so its layer was not run: pip install 'parallel-vocab-embedding[{name}]'",
            "yellow",
        )
    different = sum(comparison.differing > 0 for comparison in comparisons)
    time = "" if seconds is None else f" ({seconds:.1f} s)"
    if different:
        say(f"DIFFERENT: {different} of {len(comparisons)} comparisons{time}", "bold red")
    else:
        rows = sum(comparison.rows for comparison in comparisons)
        say(f"EQUAL: {len(comparisons)} comparisons of {rows} rows in all, max ULP 0, max abs 0{time}", "bold green")


def _overview(case: CaseFacts, pairs: list[list[Comparison]]) -> Table:
    """A row a rank: what it owns, how much of it the ids asked for, and whether each pair of backends agrees."""
    table = Table()
    for column in ("rank", "owns ids", "looked up" if case.reduction == "none" else "returns", "with gradient"):
        table.add_column(column, justify="right")
    for pair in pairs:
        table.add_column(f"{pair[0].left} = {pair[0].right}")
    for both in zip(*(zip(pair[::2], pair[1::2], strict=True) for pair in pairs), strict=True):
        forward, gradient = both[0]
        if forward.rank is None:
            table.add_section()
            label, start, stop = "sum", 0, case.vocab_size
        else:
            label, (start, stop) = str(forward.rank), case.partition.owned_range(forward.rank)
        counts = (f"{part.nonzero} of {part.rows}" for part in (forward, gradient))
        owned = f"{start} - {stop - 1}" if start < stop else "none"
        table.add_row(label, owned, *counts, *(_cell(*comparisons) for comparisons in both))
    return table


def _cell(forward: Comparison, gradient: Comparison) -> Text:
    different = [f"{part.what} {part.differing}" for part in (forward, gradient) if part.differing]
    return Text("differ: " + ", ".join(different), "red") if different else Text("equal", "green")


def _heading(comparison: Comparison) -> str:
    where = "sum" if comparison.rank is None else f"rank {comparison.rank}"
    counts = ", ".join(f"{count} {kind}" for kind, count in comparison.kinds.items())
    distances = f"max {_number(comparison.max_ulp)} ULP, max abs {_number(comparison.max_abs)}"
    return f"{comparison.left} against {comparison.right}, {comparison.what}, {where}: {counts}; {distances}"


def _rows(comparison: Comparison) -> Table:
    """The first differing rows, a line each, without any frame."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    shown = comparison.examples[:_SHOWN]
    for row in shown:
        place = "position" if comparison.what == "forward" else "row"
        owner = "no rank's" if row.owner < 0 else f"rank {row.owner}'s"
        ulp = "NaN" if row.max_ulp is None else f"{_number(row.max_ulp)} ULP"
        table.add_row(f" {place} {', '.join(map(str, row.index))}", f"id {row.id}", owner, row.kind, ulp, row.note)
    if comparison.differing > len(shown):
        table.add_row(f" and {comparison.differing - len(shown)} more")
    return table


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e6 and value == round(value) else f"{value:.3g}"
