"""Comparisons as self-contained HTML pages."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from shared.checks import printable
from shared.proof.comparison import Comparison
from shared.proof.report import Pair, Report

__all__ = ["as_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2024, #e6e8ea); --paper: light-dark(#fff, #16191d);
  --faint: light-dark(#5b636b, #a3abb3); --line: light-dark(#d5dade, #3a4047);
  --good: light-dark(#12703c, #5fd08f); --bad: light-dark(#b3261e, #ff8a80); --bar: light-dark(#c4554d, #e0766d); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 75rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.equal { color: var(--good); } .different { color: var(--bad); } .note { color: var(--faint); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { border: 1px solid var(--line); padding: .2rem .6rem; text-align: right; }
td { white-space: nowrap; }
th { font-weight: 600; }
.facts th, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
td.hot { background: color-mix(in srgb, var(--bad) calc(var(--share) * 45% + 8%), var(--paper)); }
.bars td { border: 0; padding: .1rem .6rem; } .bars td:last-child { width: 30rem; }
.bar { background: var(--bar); height: 1rem; min-width: 2px; border-radius: 2px; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1.5rem; }
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
    pairs = report.pairs()
    kinds = [f"<dt>{_text(kind)}</dt><dd>{_text(meaning)}</dd>" for kind, meaning in report.meanings.items()]
    sections = {
        "The sides": _sides(report) if report.sides else [],
        "Rank by kind of difference": [line for pair in pairs for line in _map(report, pair)],
        "Rows that differ": [line for part in report.different for line in _rows(report, part)],
        "Distances of the elements that differ": [line for pair in pairs for line in _distances(pair)],
        "Kinds of difference": ["<dl>", *kinds, "</dl>"] if kinds else [],
    }
    status = "different" if report.different else "equal"
    body = [f'<h1 class="{status}">{_text(report.verdict)}</h1>', f"<p>{_text(report.title)}</p>"]
    body += [f'<p class="note">{_text(note)}</p>' for note in (*report.notes, *report.advice)]
    for title, lines in sections.items():
        body += ["<section>", f"<h2>{title}</h2>", *lines, "</section>"] if lines else []
    return "\n".join([_HEAD.format(title=f"pve: {status}", style=_STYLE), *body, "</body>\n</html>\n"])


def _text(text: str) -> str:
    return escape(printable(text))


def _cell(text: str, name: str = "") -> str:
    return f'<td class="{name}">{_text(text)}</td>' if name else f"<td>{_text(text)}</td>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> list[str]:
    """Table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    lines = (f"<tr>{''.join(row)}</tr>" for row in rows)
    return [f'<div class="wide"><table class="{name}">', f"<tr>{head}</tr>", *lines, "</table></div>"]


def _sides(report: Report) -> list[str]:
    facts = list(dict.fromkeys(fact for found in report.sides.values() for fact in found))
    rows = ([_cell(name), *(_cell(found.get(fact, "")) for fact in facts)] for name, found in report.sides.items())
    return _table(["", *facts], rows, "facts")


def _map(report: Report, pair: Pair) -> list[str]:
    """One row per rank, with the number of differing rows by kind."""
    kinds = {
        what: list(dict.fromkeys(kind for part in pair.of_array(what) for kind in part.kinds)) for what in report.arrays
    }
    header = ["rank", "owns ids"]
    for what in report.arrays:
        of = f"{what}: " if len(report.arrays) > 1 else ""
        header += [f"{of}rows", *(f"{of}{kind}" for kind in kinds[what] or ["equal"])]
    rows = []
    for rank, comparisons in pair.ranks.items():
        cells = [_cell(text) for text in report.rank_cells(rank)]
        for part in comparisons:
            cells += [_cell(str(part.rows)), *(_hot(part, kind) for kind in kinds[part.what])]
            cells += [] if kinds[part.what] else [_cell("equal", "equal")]
        rows.append(cells)
    return [f"<h3>{_text(f'{pair.left} against {pair.right}')}</h3>", *_table(header, rows, "map")]


def _hot(part: Comparison, kind: str) -> str:
    """Number of rows of a kind, shaded by their share."""
    count = part.kinds.get(kind, 0)
    return f'<td class="hot" style="--share: {count / part.rows:.3f}">{count}</td>' if count else "<td></td>"


def _rows(report: Report, part: Comparison) -> list[str]:
    summary = _text(f"{report.heading(part)}: {part.differing} rows")
    rows = ([_cell(text) for text in row.cells(part.what)] for row in part.examples)
    more = part.differing - len(part.examples)
    return [
        f"<details{' open' if part.rank is None else ''}><summary>{summary}</summary>",
        *_table(["where", "id", "owner", "looks like", "distance", "note"], rows, "facts"),
        *([f'<p class="note">and {more} more</p>'] if more else []),
        "</details>",
    ]


def _distances(pair: Pair) -> list[str]:
    """Histograms of distances, over all ranks of each array."""
    lines = []
    for what in dict.fromkeys(part.what for found in pair.ranks.values() for part in found):
        *ranks, whole = pair.of_array(what)
        by_rank, together = sum((Counter(part.ulps) for part in ranks), Counter[str]()), Counter(whole.ulps)
        # The sum may differ where no rank's result does; a whole table differs as its ranks do.
        shown = {"": together} if by_rank == together else {", ranks": by_rank, ", sum": together}
        for name, counts in shown.items():
            if counts:
                lines += [f"<h3>{_text(f'{pair.left} against {pair.right}, {what}{name}')}</h3>", *_bars(counts)]
    if lines:
        lines.append('<p class="note">The length of a bar is the logarithm of the count.</p>')
    return lines


def _bars(counts: Counter[str]) -> list[str]:
    most = math.log1p(max(counts.values()))
    rows = []
    for least in sorted(counts, key=lambda name: math.inf if name == "NaN" else float(name)):
        width = 100 * math.log1p(counts[least]) / most
        bar = f'<td><div class="bar" style="width: {width:.1f}%"></div></td>'
        rows.append([_cell(_range(least)), _cell(str(counts[least])), bar])
    return _table(["ULP", "elements", ""], rows, "bars")


def _range(least: str) -> str:
    """Range of distances of a key of ``Comparison.ulps``."""
    if least in ("0", "1", "NaN"):
        return "0 (sign of zero)" if least == "0" else least
    low = int(least)
    return f"{low} - {2 * low - 1}" if low < 2**20 else f"2^{low.bit_length() - 1} - 2^{low.bit_length()}"
