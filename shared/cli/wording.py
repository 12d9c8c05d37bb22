"""Translation of Python arguments in error messages to command-line options."""

import argparse
import re

__all__ = ["in_words_of"]

_ALIASES = {"tensor_name": "tensor"}
"""Options whose name differs from that of the argument."""


def in_words_of(options: argparse.Namespace, message: str) -> str:
    """Replace arguments in a message by the options of the command.

    A name without an underscore may be a plain word, so it is replaced in ``name=value`` only.

    Example:
        >>> from argparse import Namespace
        >>> from shared.cli.wording import in_words_of
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
