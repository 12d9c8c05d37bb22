"""Comparisons as Markdown, for the summary of a CI run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from shared.checks import printable
from shared.proof.report import Report, describe_kinds, describe_number, describe_parts, describe_row

__all__ = ["as_markdown"]


def as_markdown(report: Report) -> str:
    """Format verdict, results per rank, and the differing arrays.

    Example:
        >>> from shared import VocabPartition
        >>> from shared.proof.comparison import Comparison
        >>> from shared.proof.markdown_report import as_markdown
        >>> from shared.proof.report import Report
        >>> equal = Comparison("a", "b", "table", None, rows=12, nonzero=12)
        >>> report = Report("12 x 4 float32", (), {}, VocabPartition(12, 3), {"table": "not zero"}, [equal], {})
        >>> print(as_markdown(report).splitlines()[0])
        **EQUAL: 1 comparisons of 12 rows in all, max ULP 0, max abs 0**
    """
    pairs = report.pairs()
    lines = [f"**{report.verdict}**", "", _escape(report.title), ""]
    lines += [f"- {_escape(note)}" for note in (*report.notes, *report.advice)]
    lines += [f"- {_escape(name)}: {_escape(facts)}" for name, facts in report.side_lines.items()]
    ranks = [
        [*report.rank_cells(rank), *(describe_parts(pair.ranks[rank]) for pair in pairs)] for rank in pairs[0].ranks
    ]
    lines += ["", *_table(["rank", "owns ids", *(f"{pair.left} = {pair.right}" for pair in pairs)], ranks)]
    found_different = [
        [
            f"{part.left} = {part.right}",
            part.what,
            report.rank_cells(part.rank)[0],
            describe_kinds(part),
            describe_number(part.max_ulp),
            ", ".join(filter(None, describe_row(part.what, part.examples[0]))),
        ]
        for part in report.comparisons
        if part.differing
    ]
    if found_different:
        lines += ["", *_table(["sides", "array", "rank", "looks like", "max ULP", "first"], found_different)]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[_escape(cell) for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(header), *cells[1:]]]


def _escape(text: str) -> str:
    """Escape Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))
