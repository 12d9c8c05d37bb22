"""``pve plan``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from shared.bits import DTYPES, dtype_named
from shared.checks import check_size
from shared.cli.console import output, print_json
from shared.partition import VocabPartition

__all__ = ["add_parser"]

_DESCRIPTION = """\
Say which rank owns which rows of a vocabulary table, and with --emb-size what each rank keeps in memory.

examples:
  pve plan --vocab-size 131072 --world-size 8
  pve plan --vocab-size 128256 --world-size 8 --emb-size 8192 --dtype bfloat16

exit status: 0, or 2 where the vocabulary cannot be split so"""


def add_parser(commands: Any) -> None:
    """Add ``pve plan`` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="who owns which rows, and the memory each rank needs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="V", help="rows of the whole table")
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks; must divide V")
    parser.add_argument("--emb-size", type=int, metavar="E", help="columns; with it, memory is shown")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16", help="of the table (default bfloat16)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    partition = VocabPartition(options.vocab_size, options.world_size)
    n, ranks = partition.rows_per_rank, range(partition.world_size)
    row_bytes = None
    if options.emb_size is not None:
        row_bytes = check_size("emb_size", options.emb_size) * dtype_named(options.dtype).itemsize
    if options.json:
        plan: dict[str, Any] = {
            "vocab_size": partition.vocab_size,
            "world_size": partition.world_size,
            "rows_per_rank": n,
            "ranks": [{"rank": r, "start": partition.start(r), "stop": partition.stop(r)} for r in ranks],
        }
        if row_bytes is not None:
            plan |= {
                "emb_size": options.emb_size,
                "dtype": options.dtype,
                "table_bytes": partition.vocab_size * row_bytes,
                "bytes_per_rank": n * row_bytes,
            }
        print_json(plan)
        return 0
    table = Table(
        title=f"{partition.vocab_size} rows over {partition.world_size} ranks, {n} each", title_justify="left"
    )
    for column in ("rank", "first id", "last id", "rows", *(["table", "dense gradient"] if row_bytes else [])):
        table.add_column(column, justify="right")
    for rank in ranks:
        memory = [decimal(n * row_bytes)] * 2 if row_bytes else []
        table.add_row(str(rank), str(partition.start(rank)), str(partition.stop(rank) - 1), str(n), *memory)
    console = output()
    console.print(table)
    if row_bytes:
        whole = decimal(partition.vocab_size * row_bytes)
        console.print(f"{options.emb_size} columns of {options.dtype}: the whole table is {whole}.", markup=False)
    return 0
