"""Argument checks and error messages of both backends.

A message names the argument, the rule, the value given and the remedy.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

__all__ = [
    "EXCHANGES",
    "INITS",
    "INVALID_IDS",
    "REDUCTIONS",
    "SEED_LIMIT",
    "as_int",
    "as_number",
    "check_choice",
    "check_flag",
    "check_init",
    "check_normal",
    "check_padding_idx",
    "check_rank",
    "check_seed",
    "check_size",
    "ids_type_error",
    "invalid_id_error",
    "printable",
    "table_dtype_error",
]

SEED_LIMIT = 2**63
"""Seeds lie in ``[-SEED_LIMIT, SEED_LIMIT)``: what both frameworks' generators take."""

REDUCTIONS = ("none", "all_reduce", "reduce_scatter", "all_to_all")
"""Results of a lookup: the incomplete embedding, the embedding, the rank's chunk of it, or that of the rank's own ids."""

EXCHANGES = ("auto", "dense", "routed")
"""How rows travel: as the layer chooses, by a dense collective, or from their owner to the ranks that need them."""

INVALID_IDS = ("zero", "error")
"""Result for an id outside the vocabulary: a row of zeros, or an IndexError."""

INITS = ("per_rank", "global")
"""What initial values depend on: the rank that holds them, or the row number alone."""


def printable(text: str) -> str:
    """Escape control characters, and cut the middle of text over 2000 characters.

    Example:
        >>> from shared.checks import printable
        >>> printable("wte.weight" + chr(10) + chr(27) + "[2J")
        'wte.weight\\\\n\\\\x1b[2J'
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}"


def as_int(name: str, value: object) -> int:
    """Convert an integer of any type to int; refuse bools and floats."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")


def as_number(name: str, value: object) -> float:
    """Convert a number of any type to float; refuse bools and text."""
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    except OverflowError:
        raise ValueError(f"{name} must fit a 64-bit float") from None
    raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_size(name: str, value: object) -> int:
    """Validate a count: an integer of at least 1."""
    size = as_int(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def check_rank(rank: object, world_size: int) -> int:
    """Validate a rank: an integer in ``[0, world_size)``."""
    number = as_int("rank", rank)
    if not 0 <= number < world_size:
        raise ValueError(
            f"rank must be in [0, world_size) = [0, {world_size}), got {number}; correct the rank or the world_size"
        )
    return number


def check_seed(init_base_seed: object, world_size: int) -> int:
    """Validate rank 0's seed; every rank's must be in ``[-2**63, 2**63)``."""
    seed = as_int("init_base_seed", init_base_seed)
    if not -SEED_LIMIT <= seed <= SEED_LIMIT - world_size:
        raise ValueError(
            f"init_base_seed must keep every rank's seed, init_base_seed + rank, in [-2**63, 2**63); "
            f"got {seed} with world_size={world_size}"
        )
    return seed


def check_normal(init_mean: object, init_std: object) -> tuple[float, float]:
    """Validate mean and standard deviation: finite numbers, the latter not negative."""
    mean, std = as_number("init_mean", init_mean), as_number("init_std", init_std)
    for name, number in (("init_mean", mean), ("init_std", std)):
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    if std < 0:
        raise ValueError(f"init_std must not be negative, got {std}")
    return mean, std


def check_choice(name: str, value: object, choices: Sequence[str], others: str = "") -> str:
    """Validate a word out of ``choices``; an error names ``others`` too."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}{others}, got {value!r}")
    return choices[choices.index(value)]  # a plain str, also for a subclass of str


def check_init(value: object) -> Any:
    """Validate an initialisation: one of ``INITS``, a callable, or None."""
    if value is None or callable(value):
        return value
    return check_choice("init", value, INITS, ", a callable or None")


def check_flag(name: str, value: object) -> bool:
    """Validate a flag: a bool, not merely something truthy."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_padding_idx(padding_idx: object, vocab_size: int) -> int | None:
    """Validate ``padding_idx``: None or an id of the whole vocabulary."""
    if padding_idx is None:
        return None
    index = as_int("padding_idx", padding_idx)
    if not 0 <= index < vocab_size:
        raise ValueError(f"padding_idx must be an id of the whole vocabulary, in [0, {vocab_size}), got {index}")
    return index


def table_dtype_error(dtype: object) -> TypeError:
    """TypeError for an unsupported dtype of a table."""
    return TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


def ids_type_error(given: object, expected: str) -> TypeError:
    """TypeError for ids that are not integers, with their type or dtype."""
    return TypeError(f"ids must be {expected} of an integer dtype, got {given}; convert them first")


def invalid_id_error(value: int, position: Sequence[int], vocab_size: int) -> IndexError:
    """IndexError of ``invalid_ids="error"`` for one id and its position."""
    where = f"ids[{', '.join(map(str, position))}]" if position else "ids"
    return IndexError(
        f"{where} = {value} is outside the vocabulary [0, {vocab_size}); "
        f'correct the ids, or pass invalid_ids="zero" to get zero rows for such ids'
    )
