"""Show which rank owns which rows, memory per rank, and padding rules.

Memory is shown with --emb-size. A second table shows the vocabulary padded by the usual rules.

A vocabulary that W does not divide must be padded with zero rows at the end, which belong to no id. Without
--padded-vocab-size, only the second table is shown for it.

examples:
  pve plan --vocab-size 131072 --world-size 8
  pve plan --vocab-size 128256 --world-size 8 --emb-size 8192 --dtype bfloat16
  pve plan --vocab-size 50257 --world-size 8 --padded-vocab-size '128*w'

exit status: 0 done, 2 a size is out of range
"""

import argparse
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from shared.bits import DTYPES, dtype_named
from shared.checks import check_size
from shared.cli.case_arguments import dtype_name
from shared.cli.console import output, print_json, say
from shared.padding_rules import RULE_HELP, RULES, padded_by_rule
from shared.partition import VocabPartition

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve plan``."""
    parser.add_argument("--vocab-size", type=int, required=True, metavar="V", help="rows of the whole table")
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks; must divide V after padding")
    parser.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
    parser.add_argument("--emb-size", type=int, metavar="E", help="columns; shows memory")
    parser.add_argument(
        "--dtype", type=dtype_name, choices=[*DTYPES], default="bfloat16", help="of the table (default bfloat16)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    vocab_size, world_size = options.vocab_size, options.world_size
    rules = {rule: padded_by_rule(rule, vocab_size, world_size) or 0 for rule in RULES}
    padded = padded_by_rule(options.padded_vocab_size, vocab_size, world_size)
    over = vocab_size % world_size if padded is None else 0
    partition = None if over else VocabPartition(vocab_size, world_size, padded)
    row_bytes = None
    if options.emb_size is not None:
        row_bytes = check_size("emb_size", options.emb_size) * dtype_named(options.dtype).itemsize
    if options.json:
        print_json(options.command, _as_dict(options, partition, rules, row_bytes))
        return 0
    if partition is not None:
        _print_ranks(partition, row_bytes)
    else:
        say(f"{vocab_size} rows over {world_size} ranks leave {over} over: pad with --padded-vocab-size.")
    if row_bytes:
        whole = decimal(vocab_size * row_bytes)
        say(f"{options.emb_size} columns of {options.dtype}: the whole table is {whole}.")
    rows = []
    for rule, size in rules.items():
        padding = size - vocab_size
        row = {"--padded-vocab-size": rule, "rows in all": size, "each rank": size // world_size, "padding": padding}
        rows.append({**row, "padding is": decimal(padding * row_bytes)} if row_bytes else row)
    _print_table("padded by the rules in use", rows)
    return 0


def _as_dict(
    options: argparse.Namespace, partition: VocabPartition | None, rules: dict[str, int], row_bytes: int | None
) -> dict[str, Any]:
    n = None if partition is None else partition.rows_per_rank
    ranks = [] if partition is None else [partition.owned_range(rank) for rank in range(partition.world_size)]
    plan = {
        "vocab_size": options.vocab_size,
        "world_size": options.world_size,
        "padded_vocab_size": None if partition is None else partition.padded_vocab_size,
        "rows_per_rank": n,
        "ranks": [{"rank": rank, "start": start, "stop": stop} for rank, (start, stop) in enumerate(ranks)],
        "padding_rules": rules,
    }
    if row_bytes is not None:
        plan |= {"emb_size": options.emb_size, "dtype": options.dtype, "table_bytes": options.vocab_size * row_bytes}
        plan["bytes_per_rank"] = None if n is None else n * row_bytes
    return plan


def _print_ranks(partition: VocabPartition, row_bytes: int | None) -> None:
    n, padded, rows = partition.rows_per_rank, "", []
    if partition.padding_rows:
        padded = f", padded to {partition.padded_vocab_size},"
    for rank in range(partition.world_size):
        start, stop = partition.owned_range(rank)
        first, last = (start, stop - 1) if start < stop else ("none", "none")
        row = {"rank": rank, "first id": first, "last id": last, "rows": stop - start}
        if padded:
            row["padding"] = n - stop + start
        if row_bytes:
            row |= dict.fromkeys(("table", "dense gradient"), decimal(n * row_bytes))
        rows.append(row)
    _print_table(f"{partition.vocab_size} rows{padded} over {partition.world_size} ranks, {n} each", rows)


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column.startswith("--") else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    output().print(table)
