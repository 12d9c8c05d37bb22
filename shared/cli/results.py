"""Output of ``pve compare`` and ``pve diff``."""

import argparse
from pathlib import Path

from rich.table import Table
from rich.text import Text

from shared.cli.console import output, print_json, say
from shared.proof.comparison import Comparison, number
from shared.proof.html_report import as_html
from shared.proof.markdown_report import as_markdown
from shared.proof.record import replacing, writable_file
from shared.proof.report import Report

__all__ = ["add_result_arguments", "check_result_arguments", "show_result"]

_SHOWN = 3


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the output to a command."""
    result = parser.add_argument_group("result (default: tables on the terminal)")
    form = result.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON")
    form.add_argument("--markdown", action="store_true", help="print the result as Markdown, for a CI summary")
    result.add_argument("--report", type=Path, metavar="FILE.html", help="also write a self-contained page")


def check_result_arguments(options: argparse.Namespace) -> None:
    """Raise ValueError for a page that cannot be written, before any work."""
    if options.report is not None:
        if options.report.suffix != ".html":  # an existing file of this name is replaced
            raise ValueError(f"--report must name a file that ends in .html, got {options.report}")
        writable_file(options.report)


def show_result(report: Report, options: argparse.Namespace) -> int:
    """Print the report, write its page and return the exit status."""
    if options.report is not None:
        with replacing(options.report) as temporary:
            temporary.write_text(as_html(report), encoding="utf-8")
    if options.json:
        print_json(options.command, report.as_dict())
    elif options.markdown:
        print(as_markdown(report))
    else:
        _print_report(report)
    return int(bool(report.different))


def _print_report(report: Report) -> None:
    """Print title, notes, results per rank, differing rows and verdict."""
    say(report.title, "bold")
    for note in report.notes:
        say(note)
    for line in report.side_lines:
        say(f"  {line}", "dim")
    output().print(_overview(report))
    for part in report.different:
        say(f"{report.heading(part)}: {part.counts}{_distances(part)}", "bold")
        output().print(_rows(part))
    for kind, meaning in report.meanings.items():
        say(f"{kind}: {meaning}", "dim")
    for line in report.advice:
        say(line, "yellow")
    say(report.verdict, "bold red" if report.different else "bold green")


def _overview(report: Report) -> Table:
    header, *rows = report.overview()
    first_result = len(header) - len(report.pairs)
    table = Table()
    for position, column in enumerate(header):
        table.add_column(Text(column), justify="left" if position >= first_result else "right")
    for row in rows:
        if row is rows[-1]:  # all ranks together
            table.add_section()
        results = (Text(cell, "green" if cell == "equal" else "red") for cell in row[first_result:])
        table.add_row(*row[:first_result], *results)
    return table


def _distances(part: Comparison) -> str:
    if part.what == "argmax" or "ranks disagree" in part.kinds:
        return ""
    bound = f", bound {number(part.bound)}" if part.bound else ""
    return f"; max {number(part.max_ulp)} ULP, max abs {number(part.max_abs)}{bound}"


def _rows(part: Comparison) -> Table:
    """The first differing rows, one per line."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    shown = part.examples[:_SHOWN]
    for row in shown:
        place, *cells = row.cells(part.what)
        table.add_row(f" {place}", *map(Text, cells))
    if part.differing > len(shown):
        table.add_row(f" and {part.differing - len(shown)} more")
    return table
