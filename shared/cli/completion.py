"""Print a script by which a shell completes `pve`.

examples:
  pve completion bash > ~/.local/share/bash-completion/completions/pve
  pve completion zsh > ~/.zfunc/_pve          with fpath+=~/.zfunc before compinit in .zshrc
  pve completion fish > ~/.config/fish/completions/pve.fish

exit status: 0 done, 2 shtab is not installed
"""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve completion``."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from shared.cli import command_line  # which imports this module

    try:
        import shtab
    except ImportError:
        raise ValueError(
            "pve completion needs the shtab package: pip install 'parallel-vocab-embedding[completion]'"
        ) from None
    whole = command_line()
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
