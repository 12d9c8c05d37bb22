"""Checks that all ranks use the same configuration and ids."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from shared.checks import check_flag

__all__ = ["checks_wanted", "describe_ids", "disagreement", "ids_disagreement"]

_SWITCH = "PVE_CHECK"


def checks_wanted(check: bool) -> bool:
    """Whether ranks compare configuration and ids: by ``check=True`` or by ``PVE_CHECK=1``.

    Raises:
        TypeError: ``check`` is not a bool.
        ValueError: ``PVE_CHECK`` is neither 0 nor 1.
    """
    check = check_flag("check", check)
    value = os.environ.get(_SWITCH, "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {_SWITCH} must be 0 or 1, got {value!r}")
    return check or value == "1"


def describe_ids(ids: np.ndarray) -> dict[str, str]:
    """Shape, dtype and SHA-256 of the ids, to compare across ranks."""
    digest = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:16]
    return {"shape of the ids": str(ids.shape), "dtype of the ids": str(ids.dtype), "ids": f"SHA-256 {digest}..."}


def disagreement(facts: Sequence[dict[str, str]], member: str = "rank", members: str = "ranks") -> str | None:
    """Describe the first fact that differs between ranks; None if all agree.

    Example:
        >>> from shared.agreement import disagreement
        >>> disagreement([{"v": "8", "dtype": "float32"}, {"v": "8", "dtype": "float16"}, {"v": "8", "dtype": "float32"}])
        'the ranks disagree about dtype: float32 on ranks 0, 2; float16 on rank 1'
    """
    names = list(dict.fromkeys(name for known in facts for name in known))
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, known in enumerate(facts):
            ranks.setdefault(known.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            return f"the {members} disagree about {name}: {_who_has_what(ranks, member, members)}"
    return None


def ids_disagreement(ids: Sequence[np.ndarray]) -> str | None:
    """Describe the first position at which ids differ; None if all agree."""
    unequal = np.any([other != ids[0] for other in ids[1:]], axis=0)
    if not unequal.any():
        return None
    position = np.unravel_index(int(unequal.argmax()), unequal.shape)
    ranks: dict[str, list[int]] = {}
    for rank, mine in enumerate(ids):
        ranks.setdefault(str(mine[position]), []).append(rank)
    where = f"ids[{', '.join(map(str, position))}]" if position else "ids"
    found = _who_has_what(ranks, "rank", "ranks")
    return f"the ranks disagree about the ids: {where} is {found}; every rank needs the same ids"


def _who_has_what(ranks: dict[str, list[int]], member: str, members: str) -> str:
    def on(numbers: list[int]) -> str:
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"on {members if len(numbers) > 1 else member} {shown}"

    return "; ".join(f"{value} {on(numbers)}" for value, numbers in ranks.items())
