"""``pve record``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from shared.cli.case_arguments import add_case_arguments, case_options
from shared.cli.console import output, print_json, progress_steps
from shared.proof.case import build_case
from shared.proof.launch import BACKENDS, is_installed, record_backend
from shared.proof.record import writable_file

__all__ = ["add_parser"]

_DESCRIPTION = """\
Run one backend on a case and keep what it computed in a file: the first half of `pve compare`, for backends that live on
two machines. Given the same options (and the same files), the case is the same on both, to the last bit; `pve diff` then
compares the two files.

The record is a safetensors file with every rank's incomplete embedding and gradient and the sum, as far as they are not
zero; sizes, versions and SHA-256 checksums are in its metadata. It is written whole or not at all.

examples:
  pve record --backend torch -o torch.record        on one machine
  pve record --backend jax   -o jax.record          on the other
  pve diff torch.record jax.record

exit status: 0 recorded, 2 bad input"""


def add_parser(commands: Any) -> None:
    """Add ``pve record`` to the commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "record",
        help="run one backend and keep what it computed",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", required=True, choices=[*BACKENDS], help="who computes")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="RECORD", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace the record if it is there")
    add_case_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what was recorded as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if not is_installed(options.backend):
        raise ValueError(
            f"--backend {options.backend} is not installed: pip install 'parallel-vocab-embedding[{options.backend}]'"
        )
    if options.output.is_file() and not options.force:
        raise ValueError(f"-o {options.output} is there already: choose another name, or add --force")
    target = writable_file(options.output)
    with tempfile.TemporaryDirectory(prefix="pve-") as temporary, progress_steps() as begin:
        folder = Path(temporary)
        build_case(case_options(options), folder, begin("case"))
        record = record_backend(options.backend, folder, target, begin(options.backend))
    if options.json:
        facts = ("backend", "versions", "vocab_size", "emb_size", "dtype", "world_size", "padding_idx", "ids_shape")
        print_json("record", {"record": str(options.output), **{name: getattr(record, name) for name in facts}})
    else:
        output().print(
            f"{options.output}: {record.backend}, {record.vocab_size} x {record.emb_size} {record.dtype} over "
            f"{record.world_size} ranks, ids {'x'.join(map(str, record.ids_shape))}",
            markup=False,
            soft_wrap=True,
        )
    return 0
