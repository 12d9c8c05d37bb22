"""``pve completion``."""

import argparse

from shared.cli.case_arguments import Commands, add_command

__all__ = ["add_parser"]

_SHELLS = ("bash", "zsh", "fish")

_DESCRIPTION = """\
Print a script by which a shell completes commands and options of `pve`.

examples:
  pve completion bash > ~/.local/share/bash-completion/completions/pve
  pve completion zsh > ~/.zfunc/_pve          with fpath+=~/.zfunc before compinit in .zshrc
  pve completion fish > ~/.config/fish/completions/pve.fish

exit status: 0 done, 2 shtab is not installed"""


def add_parser(commands: Commands, whole: argparse.ArgumentParser) -> None:
    """Add ``pve completion``, which completes the parser ``whole``, to the commands."""
    summary = "a script by which a shell completes pve"
    parser = add_command(commands, "completion", summary, _DESCRIPTION, lambda options: _run(options, whole))
    parser.add_argument("shell", choices=_SHELLS, help="the shell")


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


def _complete_paths(parser: argparse.ArgumentParser, files: dict[str, str | dict[str, str]]) -> None:
    """Mark every argument of type Path to be completed by file names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _complete_paths(each, files)
        elif getattr(action.type, "__name__", "") == "Path":
            action.complete = files  # type: ignore[attr-defined]
