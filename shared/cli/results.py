"""Output of ``pve compare`` and ``pve diff``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shared.cli.console import output, print_json
from shared.cli.terminal_report import print_report
from shared.proof.html_report import as_html
from shared.proof.markdown_report import as_markdown
from shared.proof.record import writable_file
from shared.proof.report import Report

__all__ = ["add_result_arguments", "check_result_arguments", "show_result"]


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
        target = writable_file(options.report)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(as_html(report), encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    if options.json:
        print_json(options.command, report.as_dict())
    elif options.markdown:
        print(as_markdown(report))
    else:
        print_report(output(), report)
    return int(report.different > 0)
