"""Comparisons as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.proof.comparison import Comparison
from shared.proof.report import Report, describe_kinds, describe_number, describe_parts, describe_row

__all__ = ["print_report"]

_SHOWN = 3


def print_report(console: Console, report: Report) -> None:
    """Print title, notes, results per rank, differing rows and verdict."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    say(report.title, "bold")
    for note in report.notes:
        say(note)
    for name, facts in report.side_lines.items():
        say(f"  {name}: {facts}", "dim")
    console.print(_overview(report))
    kinds: dict[str, None] = {}
    for comparison in report.comparisons:
        if comparison.differing:
            say(_heading(comparison, report.rank_cells(comparison.rank)[0]), "bold")
            console.print(_rows(comparison))
            kinds |= dict.fromkeys(comparison.kinds)
    for kind in kinds:
        say(f"{kind}: {report.kinds[kind]}", "dim")
    for line in report.advice:
        say(line, "yellow")
    say(report.verdict, "bold red" if report.different else "bold green")


def _overview(report: Report) -> Table:
    """One row per rank: owned ids, nonzero rows, result of each pair."""
    pairs, table = report.pairs(), Table()
    for column in ("rank", "owns ids", *filter(None, report.arrays.values())):
        table.add_column(column, justify="right")
    for pair in pairs:
        table.add_column(Text(f"{pair.left} = {pair.right}"))
    for rank, comparisons in pairs[0].ranks.items():
        if rank is None:
            table.add_section()
        counts = (f"{part.nonzero} of {part.rows}" for part in comparisons if report.arrays[part.what])
        table.add_row(*report.rank_cells(rank), *counts, *(_cell(pair.ranks[rank]) for pair in pairs))
    return table


def _cell(comparisons: list[Comparison]) -> Text:
    text = describe_parts(comparisons)
    return Text(text, "green" if text == "equal" else "red")


def _heading(comparison: Comparison, rank: str) -> str:
    where = f"{comparison.what}, {rank if comparison.rank is None else f'rank {rank}'}"
    distances = f"max {describe_number(comparison.max_ulp)} ULP, max abs {describe_number(comparison.max_abs)}"
    if comparison.bound:
        distances += f", bound {describe_number(comparison.bound)}"
    if comparison.what == "argmax" or "ranks disagree" in comparison.kinds:
        return f"{comparison.left} against {comparison.right}, {where}: {describe_kinds(comparison)}"
    return f"{comparison.left} against {comparison.right}, {where}: {describe_kinds(comparison)}; {distances}"


def _rows(comparison: Comparison) -> Table:
    """The first differing rows, one per line."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    shown = comparison.examples[:_SHOWN]
    for row in shown:
        place, *cells = describe_row(comparison.what, row)
        table.add_row(f" {place}", *map(Text, cells))
    if comparison.differing > len(shown):
        table.add_row(f" and {comparison.differing - len(shown)} more")
    return table
