"""Process of a backend: reads a case, reports progress, writes a record."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.proof.case import Case, Progress
from shared.proof.record import RecordWriter

__all__ = ["PROGRESS_PREFIX", "Runner", "serve"]

PROGRESS_PREFIX = "pve-progress "

Runner = Callable[[Any, Any, Progress], None]
"""Computes a case, adds every array to the record and reports progress."""


def serve(
    backend: str,
    versions: dict[str, str],
    run: Runner,
    case_type: type[Case] = Case,
    writer: Callable[[Any, str, dict[str, str]], Any] = RecordWriter,
) -> None:
    """Run a backend on the case named on the command line."""
    parser = argparse.ArgumentParser(description=f"Record what the {backend} backend computes for a case.")
    parser.add_argument("case", type=Path, help="folder with case.json")
    parser.add_argument("record", type=Path, help="file to write")
    arguments = parser.parse_args()
    case = case_type.load(arguments.case)
    record = writer(case, backend, versions)
    run(case, record, lambda *step: print(PROGRESS_PREFIX + json.dumps(step), flush=True))
    record.write(arguments.record)
