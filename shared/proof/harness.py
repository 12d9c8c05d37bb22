"""Process of a backend: reads a case, reports progress, writes a record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from shared.proof.case import Case
from shared.proof.record import RecordWriter

__all__ = ["PROGRESS_PREFIX", "Runner", "serve"]

PROGRESS_PREFIX = "pve-progress "

Runner = Callable[[Case, RecordWriter, Callable[[str, int, int], None]], None]
"""Computes a case, adds every array to the record and reports progress."""


def serve(backend: str, versions: dict[str, str], run: Runner) -> None:
    """Run a backend on the case named on the command line."""
    parser = argparse.ArgumentParser(description=f"Record what the {backend} backend computes for a case.")
    parser.add_argument("case", type=Path, help="folder with case.json")
    parser.add_argument("record", type=Path, help="file to write")
    arguments = parser.parse_args()
    case = Case.load(arguments.case)
    record = RecordWriter(case, backend, versions)
    run(case, record, lambda *step: print(PROGRESS_PREFIX + json.dumps(step), flush=True))
    record.write(arguments.record)
