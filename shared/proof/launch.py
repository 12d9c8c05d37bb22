"""Backends, each run in its own process: both ends of it."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.proof.case import Case, Progress
from shared.proof.record import RecordWriter

__all__ = ["BACKENDS", "FRAMEWORKS", "HEAD_BACKENDS", "BackendError", "is_installed", "run_backend", "serve"]

BACKENDS = {"oracle": "shared.proof.runner", "torch": "torch_impl.runner", "jax": "jax_impl.runner"}
"""Runner module of each backend."""

HEAD_BACKENDS = {"torch": "torch_impl.head_runner", "jax": "jax_impl.head_runner"}
"""Runner module of each backend's head; its oracle runs in the comparing process."""

FRAMEWORKS = ("torch", "jax")
"""Backends that need a package of the same name."""

_PROGRESS_PREFIX = "pve-progress "


class BackendError(RuntimeError):
    """Failure of a backend's process; ``details`` is all of its standard error."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def is_installed(backend: str) -> bool:
    """Whether a backend's package is installed."""
    return backend not in FRAMEWORKS or importlib.util.find_spec(backend) is not None


def run_backend(backend: str, module: str, case: Path, record: Path, progress: Progress) -> Path:
    """Have a runner compute ``case``; return its record, or raise BackendError."""
    command = [sys.executable, "-m", module, str(case), str(record)]
    # Keeps the current folder off sys.path, also in child processes: a json.py lying there would be run.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_PROGRESS_PREFIX):
                progress(*json.loads(line.removeprefix(_PROGRESS_PREFIX)))
        status = process.wait()
        if status != 0:
            errors.seek(0)
            details = errors.read().strip()
            last = details.splitlines()[-1] if details else f"exit status {status}, no message"
            raise BackendError(f"the {backend} backend failed: {last}", details)
    return record


def serve(
    backend: str,
    versions: dict[str, str],
    run: Callable[[Any, Any, Progress], None],
    case_type: type[Case] = Case,
    writer: type[RecordWriter] = RecordWriter,
) -> None:
    """Run a backend on the case named on the command line.

    ``run`` computes a case, adds every array to the record and reports progress.
    """
    parser = argparse.ArgumentParser(description=f"Record what the {backend} backend computes for a case.")
    parser.add_argument("case", type=Path, help="folder with case.json")
    parser.add_argument("record", type=Path, help="file to write")
    arguments = parser.parse_args()
    case = case_type.load(arguments.case)
    record = writer(case, backend, versions)
    run(case, record, lambda *step: print(_PROGRESS_PREFIX + json.dumps(step), flush=True))
    record.write(arguments.record)
