"""Terminal output: results on standard output, progress and errors on standard error."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from shared.checks import printable

__all__ = ["SCHEMA_VERSION", "Steps", "fail", "in_words_of", "output", "print_json", "progress_steps", "say"]

SCHEMA_VERSION = 1
"""Version of the output of ``--json``; a removed or redefined field raises it, an added field does not."""

Steps = Callable[[str], Callable[[str, int, int], None]]
"""Begins a named step and returns the callback for its progress."""

_ALIASES = {"tensor_name": "tensor"}
"""Options whose name differs from that of the argument."""


def output() -> Console:
    """Console on standard output, 110 columns wide if not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, emoji=False)


def say(text: str, style: str = "") -> None:
    """Print a line of text as it is, however long."""
    output().print(Text(text, style), soft_wrap=True)


def print_json(command: str, value: Mapping[str, object]) -> None:
    """Print a result as one JSON document that follows ``schema.json``."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **value}
    print(json.dumps(document, indent=2, allow_nan=False))


def fail(message: str) -> int:
    """Print an error in one line and return exit status 2."""
    print(f"pve: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def in_words_of(options: argparse.Namespace, message: str) -> str:
    """Replace arguments in a message by the options of the command.

    A name without an underscore may be a plain word, so it is replaced in ``name=value`` only.

    Example:
        >>> from argparse import Namespace
        >>> from shared.cli.console import in_words_of
        >>> options = Namespace(padded_vocab_size=None, world_size=3, force=False)
        >>> in_words_of(options, 'vocab_size=7: pass padded_vocab_size="even", another world_size, or force=True')
        'vocab_size=7: pass --padded-vocab-size even, another --world-size, or --force'
    """
    names = {name: name for name in vars(options)}
    names |= {name: option for name, option in _ALIASES.items() if option in vars(options)}
    for name, option in names.items():
        flag, start = f"--{option.replace('_', '-')}", r"(?<![\w./\\'\"-])"
        message = re.sub(rf"({flag} \()?{start}{name}=True\b(?(1)\))", flag, message)  # or both: --force (force=True)
        message = re.sub(rf"{start}{name}=(\"?)([\w.]+)\1", rf"{flag} \2", message)
        if "_" in name:
            message = re.sub(rf"{start}{name}(?![\w/\\'\"=-]|\.\w)", flag, message)
    return message


@contextlib.contextmanager
def progress_steps() -> Iterator[Steps]:
    """Show a progress bar per step, while standard error is a terminal."""
    console = Console(stderr=True)
    name, what = TextColumn("{task.fields[name]:>10}"), TextColumn("{task.description}")
    columns = name, BarColumn(), what, TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def begin(name: str) -> Callable[[str, int, int], None]:
            for earlier in progress.tasks:
                progress.update(earlier.id, completed=earlier.total or 1, total=earlier.total or 1, description="done")
                progress.stop_task(earlier.id)
            task = progress.add_task("starting", total=None, name=name)
            return lambda what, done, total: progress.update(task, description=what, completed=done, total=total)

        yield begin
