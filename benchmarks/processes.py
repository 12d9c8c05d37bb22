"""Measurements in fresh processes, which write what they find as JSON."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "measured"]

ROOT = Path(__file__).parents[1]


def measured(
    module: str, spec: Any, what: str, advance: Callable[[], object] = lambda: None, ranks: int | None = None
) -> Any:
    """Run a measurement, and return what it found.

    Args:
        module: run as ``python -m benchmarks.MODULE SPEC RESULT``; with ``ranks``, a process for each, as
            ``python -m benchmarks.MODULE RENDEZVOUS RANK SPEC RESULT``.
        spec: what to measure, as JSON.
        what: its name in an error.
        advance: called whenever the first process is done with a round.
        ranks: number of processes that work together. None: one by itself.

    Raises:
        RuntimeError: a process failed; with the end of its standard error.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        result = Path(folder) / "result.json"
        command, last = [sys.executable, "-m", f"benchmarks.{module}"], [json.dumps(spec), str(result)]
        commands = [[*command, *last]]
        if ranks is not None:
            commands = [[*command, f"{folder}/rendezvous", str(rank), *last] for rank in range(ranks)]
        errors = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            files.enter_context(subprocess.Popen(each, stdout=subprocess.PIPE, stderr=error, text=True, cwd=ROOT))
            for each, error in zip(commands, errors, strict=True)
        ]
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith('{"done"'):
                advance()
        for process, error in zip(processes, errors, strict=True):
            if process.wait() != 0:
                error.seek(0)
                raise RuntimeError(f"a process of {what} failed:\n{error.read()[-2000:]}")
        return json.loads(result.read_text())
