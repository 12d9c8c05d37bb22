"""Comparisons as Markdown, for the summary of a CI run."""

import re
from collections.abc import Sequence

from shared.checks import printable
from shared.proof.comparison import number
from shared.proof.report import Report

__all__ = ["as_markdown"]


def as_markdown(report: Report) -> str:
    """Format verdict, results per rank, and the differing arrays."""
    notes = [f"- {_escape(line)}" for line in (*report.notes, *report.advice, *report.side_lines)]
    lines = [f"**{report.verdict}**", "", _escape(report.title), "", *notes, "", *_table(report.overview())]
    if report.different:
        table = [["sides", "array", "rank", "looks like", "max ULP", "first"]]
        for part in report.different:
            first = ", ".join(filter(None, part.examples[0].cells(part.what)))
            place = [f"{part.left} = {part.right}", part.what, report.rank_cells(part.rank)[0]]
            table.append([*place, part.counts, number(part.max_ulp), first])
        lines += ["", *_table(table)]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = ([_escape(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *others]]


def _escape(text: str) -> str:
    """Escape Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))
