"""Copy a vocabulary table to one file or to Megatron-style parts.

TABLE is a safetensors file, a folder with a Hugging Face checkpoint, or a folder of parts. With --world-size W, OUTPUT is a
new folder of W equal parts, OUTPUT/mp_rank_00/model.safetensors and so on; padding rows are zero. Without it, OUTPUT is one
file without padding, which any number of ranks can load.

The table is streamed in bounded memory. Rows are read back after writing. The output appears whole or not at all, even if
the program is killed. An existing file is replaced only with --force; a folder that is not empty is never replaced.

examples:
  pve convert checkpoint-folder table.safetensors                                  (just the table of a checkpoint)
  pve convert model.safetensors table.safetensors --dtype bfloat16
  pve convert gpt2.safetensors parts --world-size 4 --padded-vocab-size '128*w'    (as Megatron-LM pads)
  pve convert parts table.safetensors --vocab-size 50257                           (which rows are not padding)
  pve convert parts parts8 --vocab-size 50257 --world-size 8 --padded-vocab-size even

exit status: 0 done, 2 bad input (nothing is changed)
"""

import argparse
import time
from pathlib import Path

from rich.filesize import decimal

from shared.bits import STORED_DTYPES
from shared.cli.case_arguments import dtype_name
from shared.cli.console import print_json, progress_steps, say
from shared.padding_rules import RULE_HELP, padded_by_rule
from shared.partition import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve convert``."""
    parser.add_argument("table", type=Path, metavar="TABLE", help="safetensors file, checkpoint or folder of parts")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file to write; with --world-size, a new folder")
    parser.add_argument("--tensor", metavar="NAME", help="tensor (default: the one named like an input embedding)")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="rows, padding excluded, of Megatron-style parts")
    parser.add_argument("--world-size", type=int, metavar="W", help="write W parts instead of one file")
    parser.add_argument("--padded-vocab-size", metavar="RULE", help=RULE_HELP)
    parser.add_argument(
        "--dtype", type=dtype_name, choices=[*STORED_DTYPES], help="cast, rounding once (default: as stored)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    started = time.perf_counter()
    if options.padded_vocab_size is not None and options.world_size is None:
        raise ValueError("--padded-vocab-size pads parts: give their number as --world-size W")
    table = open_table(options.table, options.tensor, options.vocab_size)
    partition = None
    if options.world_size is not None:
        padded = padded_by_rule(options.padded_vocab_size, table.vocab_size, options.world_size)
        partition = VocabPartition(table.vocab_size, options.world_size, padded)
    with progress_steps() as begin:
        step, done = begin("convert"), 0

        def progress(rows: int) -> None:
            nonlocal done
            done += rows
            step(f"{done} of {table.vocab_size} rows", done, table.vocab_size)

        force, dtype = options.force, options.dtype
        files = convert_table(table, options.output, partition, dtype=dtype, force=force, progress=progress)
    facts = {
        "output": str(options.output),
        "files": [str(file) for file in files],
        "tensor": table.tensor,
        "dtype": options.dtype or table.dtype,
        "vocab_size": table.vocab_size,
        "emb_size": table.emb_size,
        "world_size": options.world_size,
        "padded_vocab_size": None if partition is None else partition.padded_vocab_size,
        "bytes": sum(file.stat().st_size for file in files),
    }
    if options.json:
        print_json(options.command, facts)
        return 0
    parts = ""
    if partition is not None:
        padding = f" padded to {partition.padded_vocab_size}" if partition.padding_rows else ""
        parts = f",{padding} in {len(files)} parts"
    say(
        f"{options.output}: {table.tensor}, {table.vocab_size} x {table.emb_size} {facts['dtype']}{parts}, "
        f"{decimal(facts['bytes'])} ({time.perf_counter() - started:.1f} s)"
    )
    return 0
