"""``pve diff``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shared.cli.console import output, print_json, progress_steps
from shared.proof.diff import compare_records
from shared.proof.record import Record
from shared.proof.report import as_json, print_report

__all__ = ["add_parser"]

_DESCRIPTION = """\
Compare two records of `pve record`, bit by bit: every rank's incomplete embedding and gradient, and the sum. Rows that
differ are counted, the first few named with id and owner rank, and described as what they look like: off by one row,
ranks swapped, zeroed, padding only, rounding only, sign of zero, NaN and so on.

example:
  pve diff torch.record jax.record

exit status: 0 equal, 1 different, 2 bad input (another case, a truncated or foreign file)"""


def add_parser(commands: Any) -> None:
    """Add ``pve diff`` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="compare two records",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("left", type=Path, metavar="A", help="a record")
    parser.add_argument("right", type=Path, metavar="B", help="another one, of the same case")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    left, right = Record.open(options.left), Record.open(options.right)
    with progress_steps() as begin:
        comparisons = compare_records(left, right, begin("compare"))
    versions = {str(record.path): {"backend": record.backend, **record.versions} for record in (left, right)}
    if options.json:
        print_json(as_json(left, versions, comparisons, []))
    else:
        print_report(output(), left, versions, comparisons, [])
    return int(any(comparison.differing for comparison in comparisons))
