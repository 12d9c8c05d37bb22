"""``pve shard``, ``pve reshard`` and ``pve merge``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from shared.bits import STORED_DTYPES
from shared.cli.case_arguments import dtype_name
from shared.cli.console import output, print_json, progress_steps
from shared.padding_rules import RULE_HELP, padded_by_rule
from shared.partition import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

__all__ = ["add_parsers"]

_ALL = """\
It streams: memory does not grow with the table. Every row is read back after it was written. The result is there whole or
not at all, whenever the program is stopped; what was there before stays until then, and is replaced with --force only."""

_SHARD = f"""\
Write a vocabulary table as one file a rank, with a manifest of sizes, partition and checksums. Rows of padding are in no
file, so the set can be loaded by any number of ranks: the partition only says which rows lie together.

{_ALL}

With --layout megatron: Megatron-LM's way, equal parts mp_rank_00/model.safetensors and so on, padding included.

examples:
  pve shard model.safetensors -o shards --world-size 8
  pve shard checkpoint-folder -o shards --world-size 8 --padded-vocab-size even --dtype bfloat16
  pve shard gpt2.safetensors -o parts --world-size 4 --layout megatron --padded-vocab-size '128*w'

exit status: 0 done, 2 bad input (nothing is changed then)"""

_RESHARD = f"""\
Write a set of shards anew for another number of ranks, with any padding, in any dtype; in place with -o SET --force.

{_ALL}

examples:
  pve reshard shards -o shards6 --world-size 6 --padded-vocab-size even
  pve reshard shards -o shards --world-size 4 --force
  pve reshard parts -o shards --world-size 8 --vocab-size 50257 --padded-vocab-size even    (from Megatron-style parts)

exit status: 0 done, 2 bad input (nothing is changed then)"""

_MERGE = f"""\
Put a set of shards together to one safetensors file, whose tensor has just the bytes of the table that was sharded.

{_ALL}

examples:
  pve merge shards -o table.safetensors
  pve merge parts -o table.safetensors --vocab-size 50257      (Megatron-style parts: which rows are not padding)

exit status: 0 done, 2 bad input (nothing is changed then)"""


def add_parsers(commands: Any) -> None:
    """Add the three commands."""
    for name, short, description in (
        ("shard", "write a table as one file a rank", _SHARD),
        ("reshard", "write a set of shards anew for another number of ranks", _RESHARD),
        ("merge", "put a set of shards together to one file", _MERGE),
    ):
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=short, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("table", type=Path, metavar="TABLE", help="safetensors file, checkpoint or set of shards")
        whole = name == "merge"
        where = "the safetensors file to write" if whole else "the folder to write"
        parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help=where)
        parser.add_argument(
            "--tensor", metavar="NAME", help="the tensor; left out, the one that looks like an input embedding"
        )
        parser.add_argument(
            "--vocab-size", type=int, metavar="V", help="rows that are not padding, of Megatron-style parts"
        )
        if not whole:
            parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks")
            parser.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
            parser.add_argument(
                "--layout",
                choices=["shards", "megatron"],
                default="shards",
                help="files with a manifest (the default), or equal parts with padding, as Megatron-LM has them",
            )
        parser.add_argument(
            "--dtype",
            type=dtype_name,
            choices=[*STORED_DTYPES],
            help="what to cast to, rounding once (default: as it is)",
        )
        parser.add_argument("--force", action="store_true", help="replace what is there")
        parser.add_argument("--json", action="store_true", help="print what was written as JSON")
        parser.set_defaults(
            run=_run, **({"world_size": 1, "padded_vocab_size": None, "layout": "file"} if whole else {})
        )


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    table = open_table(options.table, options.tensor, options.vocab_size)
    padded = padded_by_rule(options.padded_vocab_size, table.vocab_size, options.world_size)
    partition = VocabPartition(table.vocab_size, options.world_size, padded)
    with progress_steps() as begin:
        step, done = begin(options.command), 0

        def progress(rows: int) -> None:
            nonlocal done
            done += rows
            step(f"{done} of {table.vocab_size} rows", done, table.vocab_size)

        files = convert_table(
            table,
            options.output,
            options.layout,
            partition,
            dtype=options.dtype,
            force=options.force,
            progress=progress,
        )
    dtype = options.dtype or table.dtype
    size = sum(file.stat().st_size for file in files)
    if options.json:
        print_json(
            {
                "output": str(options.output),
                "files": [str(file) for file in files],
                "tensor": table.tensor,
                "dtype": dtype,
                "vocab_size": table.vocab_size,
                "emb_size": table.emb_size,
                "world_size": partition.world_size,
                "padded_vocab_size": partition.padded_vocab_size,
                "bytes": size,
            }
        )
        return 0
    many = f"{len(files)} files" if len(files) > 1 else "1 file"
    padding = f", padded to {partition.padded_vocab_size}" if partition.padding_rows else ""
    ranks = f" over {partition.world_size} ranks{padding}" if options.command != "merge" else ""
    output().print(
        f"{options.output}: {table.tensor}, {table.vocab_size} x {table.emb_size} {dtype}{ranks}: {many}, {decimal(size)} "
        f"({time.perf_counter() - started:.1f} s)",
        markup=False,
        soft_wrap=True,
    )
    return 0
