"""What the commands say on the terminal: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from shared.checks import printable

__all__ = ["SCHEMA_VERSION", "Steps", "fail", "output", "print_json", "progress_steps"]

SCHEMA_VERSION = 1
"""Of what ``--json`` prints. It grows where something is removed or changes its meaning; more may come without."""

Steps = Callable[[str], Callable[[str, int, int], None]]
"""Begins a step of the work, by name, and returns what to report its progress to."""


def output() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, emoji=False)


def print_json(command: str, value: dict[str, Any]) -> None:
    """Print what a command found as one JSON document, of the schema in ``schema.json`` beside this file."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **value}
    print(json.dumps(document, indent=2, allow_nan=False))


def fail(message: str) -> int:
    """One line on standard error; returns the exit status for bad input."""
    print(f"pve: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def progress_steps() -> Iterator[Steps]:
    """Progress bars on standard error, one a step, where it is a terminal; gone when the work is done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[name]:>10}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def begin(name: str) -> Callable[[str, int, int], None]:
            for earlier in progress.tasks:
                progress.update(earlier.id, completed=earlier.total or 1, total=earlier.total or 1, description="done")
                progress.stop_task(earlier.id)
            task = progress.add_task("starting", total=None, name=name)
            return lambda what, done, total: progress.update(task, description=what, completed=done, total=total)

        yield begin
