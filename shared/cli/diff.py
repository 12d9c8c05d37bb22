"""Compare two records, or two vocabulary tables in files, bit by bit.

Of two records of `pve record`, it compares every rank's result and gradient, and the sum. Of tables, it compares every row.
A table is a safetensors file, a Hugging Face checkpoint (index or folder) or a folder of Megatron-style parts. If dtypes
differ, the wider one is rounded to the narrower. Rows that only the taller table has are padding if they all hold the same
values.

Differing rows are counted by kind: off by one row, ranks swapped, zeroed, rounding only, sign of zero, NaN and so on.
The first of each kind are listed with id and owner.

examples:
  pve diff torch.record jax.record
  pve diff model.safetensors megatron-parts --report diff.html
  pve diff checkpoint-folder export.safetensors --tensor model.embed_tokens.weight --tensor embedding --world-size 8

exit status: 0 equal, 1 different, 2 bad input (another case, other columns, a truncated or foreign file)
"""

import argparse
from pathlib import Path

from shared.cli.console import progress_steps
from shared.cli.results import add_result_arguments, check_result_arguments, show_result
from shared.proof.diff import compare_records
from shared.proof.record import Record, is_record
from shared.proof.report import Report, case_report
from shared.proof.table_diff import compare_tables
from shared.tables.find_table import open_table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve diff``."""
    parser.add_argument("left", type=Path, metavar="A", help="a record or a table")
    parser.add_argument("right", type=Path, metavar="B", help="a record of the same case, or a table")
    tables = parser.add_argument_group("tables")
    tables.add_argument(
        "--tensor",
        action="append",
        metavar="NAME",
        help="tensor in both files; given twice: in A, then in B (default: the one named like an input embedding)",
    )
    tables.add_argument("--vocab-size", type=int, metavar="V", help="rows to compare; later rows are padding")
    ranks = "ranks that differing rows are attributed to (default: the number of parts)"
    tables.add_argument("--world-size", type=int, metavar="W", help=ranks)
    add_result_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    check_result_arguments(options)
    paths = options.left, options.right
    records = [path.is_file() and path.suffix != ".json" and is_record(path) for path in paths]
    if records[0] != records[1]:
        record, other = paths if records[0] else paths[::-1]
        raise ValueError(f"{record} is a record, but {other} is not a record of `pve record`: give two of one kind")
    return show_result(_diff_records(options) if records[0] else _diff_tables(options), options)


def _diff_records(options: argparse.Namespace) -> Report:
    for name in ("tensor", "vocab_size", "world_size"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for tables, but {options.left} is a record: leave it out")
    left, right = Record.open(options.left), Record.open(options.right)
    with progress_steps() as begin:
        comparisons = compare_records(left, right, begin("compare"))
    versions = {str(record.path): {"backend": record.backend, **record.versions} for record in (left, right)}
    return case_report(left, left.array("ids"), versions, comparisons)


def _diff_tables(options: argparse.Namespace) -> Report:
    tensors = options.tensor or [None]
    if len(tensors) > 2:
        raise ValueError(f"--tensor must be given once, or twice for A and B, got {len(tensors)} names")
    left, right = (
        open_table(path, tensor, with_padding=True)
        for path, tensor in zip((options.left, options.right), (tensors[0], tensors[-1]), strict=True)
    )
    with progress_steps() as begin:
        return compare_tables(left, right, options.vocab_size, options.world_size, begin("tables"))
