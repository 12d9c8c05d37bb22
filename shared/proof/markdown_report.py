"""A comparison as Markdown, for the summary of a CI run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from shared.checks import printable
from shared.proof.report import Report, describe_number, describe_row

__all__ = ["as_markdown"]


def as_markdown(report: Report) -> str:
    """The verdict, a row a rank, and a row for each array that differs with its first differing row.

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
    for name, found in report.sides.items():
        facts = ", ".join(f"{package} {version}" for package, version in found.items())
        lines.append(f"- {_escape(name)}: {_escape(facts)}")
    ranks = []
    for rank in pairs[0].ranks:
        cells = []
        for pair in pairs:
            different = [f"{part.what} {part.differing}" for part in pair.ranks[rank] if part.differing]
            cells.append(f"differ: {', '.join(different)}" if different else "equal")
        ranks.append([*report.rank_cells(rank), *cells])
    lines += ["", *_table(["rank", "owns ids", *(f"{pair.left} = {pair.right}" for pair in pairs)], ranks)]
    found_different = [
        [
            f"{part.left} = {part.right}",
            part.what,
            report.rank_cells(part.rank)[0],
            ", ".join(f"{count} {kind}" for kind, count in part.kinds.items()),
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
    """The text with all that Markdown or HTML in it could mean taken literally."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", printable(text))
