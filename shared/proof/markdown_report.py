"""Comparisons as Markdown, for the summary of a CI run."""

import re
from collections.abc import Sequence

from shared.checks import printable
from shared.proof.comparison import Comparison, number
from shared.proof.report import Report

__all__ = ["as_markdown"]


def as_markdown(report: Report) -> str:
    """Format verdict, results per rank, and the differing arrays."""
    lines = [f"**{report.verdict}**", "", _escape(report.title), ""]
    sides = (f"{name}: {facts}" for name, facts in report.side_lines.items())
    lines += [f"- {_escape(line)}" for line in (*report.notes, *report.advice, *sides)]
    lines += ["", *_table(report.overview(counts=False))]
    if report.different:
        header = ["sides", "array", "rank", "looks like", "max ULP", "first"]
        lines += ["", *_table([header, *(_row(report, part) for part in report.different)])]
    return "\n".join(lines)


def _row(report: Report, part: Comparison) -> list[str]:
    first = ", ".join(filter(None, part.examples[0].cells(part.what)))
    rank = report.rank_cells(part.rank)[0]
    return [f"{part.left} = {part.right}", part.what, rank, part.counts, number(part.max_ulp), first]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = ([_escape(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *others]]


def _escape(text: str) -> str:
    """Escape Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))
