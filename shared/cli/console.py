"""Terminal output: results on standard output, progress and errors on standard error."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from shared.checks import printable

__all__ = ["SCHEMA_VERSION", "Steps", "fail", "output", "print_json", "progress_steps"]

SCHEMA_VERSION = 1
"""Version of the output of ``--json``; a removed or redefined field raises it, an added field does not."""

Steps = Callable[[str], Callable[[str, int, int], None]]
"""Begins a named step and returns the callback for its progress."""


def output() -> Console:
    """Console on standard output, 110 columns wide if not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, emoji=False)


def print_json(command: str, value: Mapping[str, object]) -> None:
    """Print a result as one JSON document that follows ``schema.json``."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **value}
    print(json.dumps(document, indent=2, allow_nan=False))


def fail(message: str) -> int:
    """Print an error in one line and return exit status 2."""
    print(f"pve: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def progress_steps() -> Iterator[Steps]:
    """Show a progress bar per step, while standard error is a terminal."""
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
