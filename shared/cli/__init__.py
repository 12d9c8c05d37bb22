"""The command ``pve``."""

import argparse
import sys
from collections.abc import Sequence

from shared.cli import compare, completion, convert, diff, env, plan, record
from shared.cli.console import fail, in_words_of
from shared.proof.launch import BackendError

__all__ = ["command_line", "main"]

_DESCRIPTION = """\
A vocabulary-parallel embedding, in PyTorch and in JAX, proven equal bit for bit.

Rank r of w keeps rows [r*n, (r+1)*n) of the vocabulary table, n = v / w, looks up the ids it owns and returns zero rows
for the others; the ranks' results sum to the embedding.

`pve COMMAND --help` describes a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = command_line().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, TypeError, IndexError, OSError, OverflowError) as error:
        return fail(in_words_of(options, str(error)))
    except MemoryError as error:
        return fail(f"not enough memory: {error}")
    except BackendError as error:
        print(error.details, file=sys.stderr)
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("interrupted")


def command_line() -> argparse.ArgumentParser:
    """Parser of the command line; each module of a subcommand documents it."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="pve", description=_DESCRIPTION, formatter_class=form)
    version = env.version("parallel-vocab-embedding") or "of a source folder, not installed"
    parser.add_argument("--version", action="version", version=f"pve {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (compare, plan, record, diff, convert, env, completion):
        name, text = module.__name__.rpartition(".")[2], module.__doc__ or ""  # python -OO has none
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=form)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
