"""``pve completion``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]

_SHELLS = ("bash", "zsh", "fish")

_DESCRIPTION = """\
Print a script that lets a shell complete the commands and options of `pve`.

examples:
  pve completion bash > ~/.local/share/bash-completion/completions/pve
  pve completion zsh > ~/.zfunc/_pve          with fpath+=~/.zfunc before compinit in .zshrc
  pve completion fish > ~/.config/fish/completions/pve.fish

exit status: 0 done, 2 shtab is not installed"""


def add_parser(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add ``pve completion`` to the commands; ``whole`` is the parser of them all."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help="a script by which a shell completes pve",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell")
    parser.set_defaults(run=lambda options: _run(options, whole))


def _run(options: argparse.Namespace, whole: argparse.ArgumentParser) -> int:
    try:
        import shtab
    except ImportError:
        raise ValueError(
            "pve completion needs the shtab package: pip install 'parallel-vocab-embedding[completion]'"
        ) from None
    _complete_paths(whole, shtab.FILE)
    print(shtab.complete(whole, shell=options.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Have every argument that is a path completed by the names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _complete_paths(each, files)
        elif getattr(action.type, "__name__", "") == "Path":
            action.complete = files  # type: ignore[attr-defined]
