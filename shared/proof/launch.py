"""Backends, each run in its own process."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shared.proof.case import Progress
from shared.proof.harness import PROGRESS_PREFIX
from shared.proof.head_record import HeadRecord
from shared.proof.record import Record

__all__ = ["BACKENDS", "FRAMEWORKS", "HEAD_BACKENDS", "BackendError", "is_installed", "record_backend", "record_head"]

BACKENDS = {"oracle": "shared.proof.runner", "torch": "torch_impl.runner", "jax": "jax_impl.runner"}
"""Runner module of each backend."""

HEAD_BACKENDS = {"torch": "torch_impl.head_runner", "jax": "jax_impl.head_runner"}
"""Runner module of each backend's head; its oracle runs in the comparing process."""

FRAMEWORKS = ("torch", "jax")
"""Backends that need a package of the same name."""


class BackendError(RuntimeError):
    """Failure of a backend's process; ``details`` is all of its standard error."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def is_installed(backend: str) -> bool:
    """Whether a backend's package is installed."""
    return backend not in FRAMEWORKS or importlib.util.find_spec(backend) is not None


def record_backend(backend: str, case: Path, record: Path, progress: Progress) -> Record:
    """Have a backend compute ``case`` into ``record``; BackendError if it fails."""
    _run(backend, BACKENDS[backend], case, record, progress)
    return Record.open(record)


def record_head(backend: str, case: Path, record: Path, progress: Progress) -> HeadRecord:
    """Have a backend's head compute ``case`` into ``record``; BackendError if it fails."""
    _run(backend, HEAD_BACKENDS[backend], case, record, progress)
    return HeadRecord.open(record)


def _run(backend: str, module: str, case: Path, record: Path, progress: Progress) -> None:
    command = [sys.executable, "-m", module, str(case), str(record)]
    # Keeps the current folder off sys.path, also in child processes: a json.py lying there would be run.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(PROGRESS_PREFIX):
                progress(*json.loads(line.removeprefix(PROGRESS_PREFIX)))
        status = process.wait()
        if status != 0:
            errors.seek(0)
            details = errors.read().strip()
            last = details.splitlines()[-1] if details else f"exit status {status}, no message"
            raise BackendError(f"the {backend} backend failed: {last}", details)
