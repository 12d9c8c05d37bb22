"""Run one backend on a case and keep its results.

This is the first half of `pve compare`, for backends on two machines. Equal options and files give an equal case on both
machines, bit for bit. `pve diff` compares the two files.

The record is a safetensors file with the nonzero rows of every rank's result and gradient, and of the sum. Its metadata
hold sizes, versions and SHA-256 checksums. It is written whole or not at all.

examples:
  pve record --backend torch -o torch.record        on one machine
  pve record --backend jax   -o jax.record          on the other
  pve diff torch.record jax.record

exit status: 0 recorded, 2 bad input
"""

import argparse
import tempfile
from pathlib import Path

from shared.cli.case_arguments import add_case_arguments, case_options
from shared.cli.console import print_json, progress_steps, say
from shared.proof.case import build_case
from shared.proof.launch import BACKENDS, is_installed, run_backend
from shared.proof.record import Record, writable_file

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve record``."""
    parser.add_argument("--backend", required=True, choices=[*BACKENDS], help="backend to run")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="RECORD", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing record")
    add_case_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if not is_installed(options.backend):
        raise ValueError(
            f"--backend {options.backend} is not installed: pip install 'parallel-vocab-embedding[{options.backend}]'"
        )
    if options.output.is_file() and not options.force:
        raise ValueError(f"-o {options.output} exists: choose another name, or add --force")
    target = writable_file(options.output)
    with tempfile.TemporaryDirectory(prefix="pve-") as temporary, progress_steps() as begin:
        folder = Path(temporary)
        build_case(case_options(options), folder, begin("case"))
        run_backend(options.backend, BACKENDS[options.backend], folder, target, begin(options.backend))
    record = Record.open(target)
    if options.json:
        facts = ("backend", "versions", "vocab_size", "emb_size", "dtype", "world_size", "padding_idx", "ids_shape")
        print_json("record", {"record": str(options.output), **{name: getattr(record, name) for name in facts}})
    else:
        say(
            f"{options.output}: {record.backend}, {record.vocab_size} x {record.emb_size} {record.dtype} over "
            f"{record.world_size} ranks, ids {'x'.join(map(str, record.ids_shape))}"
        )
    return 0
