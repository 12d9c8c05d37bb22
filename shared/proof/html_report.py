"""Comparisons as self-contained HTML pages."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from shared.checks import printable
from shared.proof.comparison import Comparison, number
from shared.proof.report import Report

__all__ = ["as_html"]

_STYLE = """
:root { color-scheme: light dark; --good: light-dark(#12703c, #5fd08f); --bad: light-dark(#b3261e, #ff8a80); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.equal { color: var(--good); } .different { color: var(--bad); } .note { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { border: 1px solid GrayText; padding: .2rem .6rem; text-align: right; }
td { white-space: nowrap; }
.facts th, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
td.hot { background: color-mix(in srgb, var(--bad) calc(var(--share) * 45% + 8%), Canvas); }
.bars td { border: 0; padding: .1rem .6rem; } .bars td:last-child { width: 30rem; }
.bar { background: var(--bad); height: 1rem; min-width: 2px; }
"""

# The policy keeps a browser from loading or running anything, whatever the page contains.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>"""


def as_html(report: Report) -> str:
    """Format a report as one page; all its text is escaped."""
    header, *rows = report.overview()
    sections = {
        "Result by rank": _table(header, ([*map(_cell, row)] for row in rows)),
        "Rank by kind of difference": [line for pair in report.pairs for line in _map(report, pair)],
        "Rows that differ": [line for part in report.different for line in _rows(report, part)],
        "Kinds of difference": [
            f"<p><b>{_text(k)}</b>: {_text(meaning)}</p>" for k, meaning in report.meanings.items()
        ],
    }
    status = "different" if report.different else "equal"
    body = [f'<h1 class="{status}">{_text(report.verdict)}</h1>', f"<p>{_text(report.title)}</p>"]
    body += [f'<p class="note">{_text(line)}</p>' for line in (*report.notes, *report.advice, *report.side_lines)]
    for title, lines in sections.items():
        body += ["<section>", f"<h2>{title}</h2>", *lines, "</section>"] if lines else []
    return "\n".join([_HEAD.format(title=f"pve: {status}", style=_STYLE), *body, "</body>\n</html>\n"])


def _text(text: str) -> str:
    return escape(printable(text))


def _cell(text: str) -> str:
    return f"<td>{_text(text)}</td>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str = "") -> list[str]:
    """Table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    lines = (f"<tr>{''.join(row)}</tr>" for row in rows)
    return [f'<div class="wide"><table class="{name}">', f"<tr>{head}</tr>", *lines, "</table></div>"]


def _map(report: Report, pair: tuple[str, str]) -> list[str]:
    """Number of differing rows by rank and kind, shaded by share."""
    parts = [part for part in report.comparisons if (part.left, part.right) == pair]
    found = {(part.what, kind) for part in parts for kind in part.kinds}
    if not found:
        return []
    columns = [(what, kind) for what in report.arrays for kind in report.kinds if (what, kind) in found]
    shaded: dict[int | None, dict[tuple[str, str], str]] = {part.rank: {} for part in parts}
    for part in parts:
        for kind, count in part.kinds.items():
            cell = f'<td class="hot" style="--share: {count / part.rows:.3f}">{count}</td>'
            shaded[part.rank][part.what, kind] = cell
    rows = (
        [*map(_cell, report.rank_cells(rank)), *(cells.get(column, "<td></td>") for column in columns)]
        for rank, cells in shaded.items()
    )
    header = ["rank", "owns ids", *(f"{what}: {kind}" for what, kind in columns)]
    return [f"<h3>{_text(' against '.join(pair))}</h3>", *_table(header, rows, "map")]


def _rows(report: Report, part: Comparison) -> list[str]:
    """The first differing rows, and a histogram of all distances."""
    rows = ([_cell(text) for text in row.cells(part.what)] for row in part.examples)
    more = part.differing - len(part.examples)
    return [
        f"<details{' open' if part.rank is None else ''}>",
        f"<summary>{_text(f'{report.heading(part)}: {part.differing} rows')}</summary>",
        *_table(["where", "id", "owner", "looks like", "distance", "note"], rows, "facts"),
        *([f'<p class="note">and {more} more</p>'] if more else []),
        *_bars(part.ulps),
        "</details>",
    ]


def _bars(counts: dict[str, int]) -> list[str]:
    """Number of elements by distance, in powers of two."""
    rows = []
    for least, count in counts.items():
        width = 100 * math.log1p(count) / math.log1p(max(counts.values()))
        bar = f'<td><div class="bar" style="width: {width:.1f}%"></div></td>'
        label = {"0": "0 (sign of zero)", "NaN": "NaN"}.get(least) or number(float(least))
        rows.append([_cell(label), _cell(str(count)), bar])
    return _table(["ULP from", "elements", "logarithm"], rows, "bars") if rows else []
