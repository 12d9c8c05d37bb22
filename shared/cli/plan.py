"""``pve plan``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from shared.bits import DTYPES, dtype_named
from shared.checks import check_size
from shared.cli.case_arguments import Commands, add_command, dtype_name
from shared.cli.console import output, print_json
from shared.padding_rules import RULE_HELP, RULES, padded_by_rule
from shared.partition import VocabPartition

__all__ = ["add_parser"]

_DESCRIPTION = """\
Show which rank owns which rows of a vocabulary table and, with --emb-size, the memory each rank needs. A second table
shows the vocabulary padded by the usual rules.

A vocabulary that W does not divide must be padded with zero rows at the end, which belong to no id. Without
--padded-vocab-size, only the second table is shown for it.

examples:
  pve plan --vocab-size 131072 --world-size 8
  pve plan --vocab-size 128256 --world-size 8 --emb-size 8192 --dtype bfloat16
  pve plan --vocab-size 50257 --world-size 8 --padded-vocab-size '128*w'

exit status: 0 done, 2 a size is out of range"""


def add_parser(commands: Commands) -> None:
    """Add ``pve plan`` to the commands."""
    parser = add_command(
        commands,
        "plan",
        "which rank owns which rows, memory per rank, and rules of padding",
        _DESCRIPTION,
        _run,
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="V", help="rows of the whole table")
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks; must divide V after padding")
    parser.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
    parser.add_argument("--emb-size", type=int, metavar="E", help="columns; shows memory")
    parser.add_argument(
        "--dtype", type=dtype_name, choices=[*DTYPES], default="bfloat16", help="of the table (default bfloat16)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def _run(options: argparse.Namespace) -> int:
    vocab_size = check_size("vocab_size", options.vocab_size)
    world_size = check_size("world_size", options.world_size)
    padded = padded_by_rule(options.padded_vocab_size, vocab_size, world_size)
    over = vocab_size % world_size if padded is None else 0
    partition = None if over else VocabPartition(vocab_size, world_size, padded)
    row_bytes = None
    if options.emb_size is not None:
        row_bytes = check_size("emb_size", options.emb_size) * dtype_named(options.dtype).itemsize
    rules = {rule: padded_by_rule(rule, vocab_size, world_size) or 0 for rule in RULES}
    if options.json:
        print_json(options.command, _as_dict(options, partition, rules, row_bytes))
        return 0
    console = output()
    if partition is not None:
        console.print(_ranks(partition, row_bytes))
    else:
        console.print(f"{vocab_size} rows over {world_size} ranks leave {over} over: pad with --padded-vocab-size.")
    if row_bytes:
        whole = decimal(vocab_size * row_bytes)
        console.print(f"{options.emb_size} columns of {options.dtype}: the whole table is {whole}.", markup=False)
    console.print(_rules(vocab_size, world_size, rules, row_bytes))
    return 0


def _as_dict(
    options: argparse.Namespace, partition: VocabPartition | None, rules: dict[str, int], row_bytes: int | None
) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "vocab_size": options.vocab_size,
        "world_size": options.world_size,
        "padded_vocab_size": None,
        "rows_per_rank": None,
        "ranks": [],
        "padding_rules": rules,
    }
    if partition is not None:
        ranks = [(rank, partition.owned_range(rank)) for rank in range(partition.world_size)]
        plan |= {
            "padded_vocab_size": partition.padded_vocab_size,
            "rows_per_rank": partition.rows_per_rank,
            "ranks": [{"rank": rank, "start": start, "stop": stop} for rank, (start, stop) in ranks],
        }
    if row_bytes is not None:
        plan |= {
            "emb_size": options.emb_size,
            "dtype": options.dtype,
            "table_bytes": options.vocab_size * row_bytes,
            "bytes_per_rank": None if partition is None else partition.rows_per_rank * row_bytes,
        }
    return plan


def _ranks(partition: VocabPartition, row_bytes: int | None) -> Table:
    n = partition.rows_per_rank
    padded = f", padded to {partition.padded_vocab_size}," if partition.padding_rows else ""
    title = f"{partition.vocab_size} rows{padded} over {partition.world_size} ranks, {n} each"
    table = Table(title=title, title_justify="left")
    padding = ["padding"] if partition.padding_rows else []
    memory = ["table", "dense gradient"] if row_bytes else []
    for column in ("rank", "first id", "last id", "rows", *padding, *memory):
        table.add_column(column, justify="right")
    for rank in range(partition.world_size):
        start, stop = partition.owned_range(rank)
        first, last = (str(start), str(stop - 1)) if start < stop else ("none", "none")
        cells = [str(n - stop + start)] if partition.padding_rows else []
        cells += [decimal(n * row_bytes)] * 2 if row_bytes else []
        table.add_row(str(rank), first, last, str(stop - start), *cells)
    return table


def _rules(vocab_size: int, world_size: int, rules: dict[str, int], row_bytes: int | None) -> Table:
    table = Table(title="padded by the rules in use", title_justify="left")
    table.add_column("--padded-vocab-size")
    for column in ("rows in all", "each rank", "padding", *(["padding is"] if row_bytes else [])):
        table.add_column(column, justify="right")
    for rule, size in rules.items():
        rows = size - vocab_size
        memory = [decimal(rows * row_bytes)] if row_bytes else []
        table.add_row(rule, str(size), str(size // world_size), str(rows), *memory)
    return table
