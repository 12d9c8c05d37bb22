"""Which rank owns which row of a vocabulary table, and how many rows of padding there are: decided here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.checks import as_int, check_rank, check_size
from shared.ids import widen

__all__ = ["VocabPartition", "pad_vocab_size"]


def pad_vocab_size(vocab_size: int, world_size: int, multiple_of: int = 1) -> int:
    """The least size from ``vocab_size`` on that both ``world_size`` and ``multiple_of`` divide.

    Args:
        vocab_size: rows of the whole table.
        world_size: number of ranks.
        multiple_of: what the size must be a multiple of besides: 64 as in vLLM, ``128 * world_size`` as in Megatron-LM.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.

    Source: ``--make-vocab-size-divisible-by`` of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> from shared import pad_vocab_size
        >>> pad_vocab_size(50257, 8), pad_vocab_size(50257, 8, 64), pad_vocab_size(50257, 8, 128 * 8)
        (50264, 50304, 51200)
    """
    sizes = {"vocab_size": vocab_size, "world_size": world_size, "multiple_of": multiple_of}
    rows, ranks, multiple = (check_size(name, size) for name, size in sizes.items())
    step = math.lcm(ranks, multiple)
    return -(-rows // step) * step


@dataclass(frozen=True)
class VocabPartition:
    """A vocabulary of ``vocab_size`` rows cut into ``world_size`` equal, contiguous ranges.

    Rank r keeps the half-open range ``[start(r), stop(r))`` of ``rows_per_rank`` rows, of which those from ``vocab_size``
    on are padding: no id's. The methods that take ids use only plain operators (``- >= < // *``), so NumPy arrays, torch
    tensors, JAX tracers and Python ints all go through the very same code; every integer dtype is widened first and none
    wraps.

    Args:
        vocab_size: rows of the whole table.
        world_size: number of ranks.
        padded_vocab_size: rows with those of padding, a size that ``world_size`` divides (``pad_vocab_size`` finds one);
            ``"even"``, the least such size. Left out, there is no padding and ``world_size`` must divide ``vocab_size``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1, ``padded_vocab_size`` is below ``vocab_size``, or ``world_size`` does not divide it.

    An id outside ``[0, vocab_size)``, one in the padding included, is owned by no rank.

    Source: the contiguous vocabulary ranges of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import numpy as np
        >>> from shared import VocabPartition
        >>> partition = VocabPartition(vocab_size=12, world_size=3)
        >>> partition.rows_per_rank, partition.start(1), partition.stop(1)
        (4, 4, 8)
        >>> ids = np.array([0, 4, 7, 11, 12, -1])
        >>> partition.owner(ids)
        array([ 0,  1,  1,  2, -1, -1])
        >>> partition.owns(ids, rank=1)
        array([False,  True,  True, False, False, False])
        >>> partition.local_ids(ids, rank=1)
        array([-4,  0,  3,  7,  8, -5])
        >>> padded = VocabPartition(vocab_size=10, world_size=4, padded_vocab_size="even")
        >>> padded.padded_vocab_size, [padded.owned_range(rank) for rank in range(4)]
        (12, [(0, 3), (3, 6), (6, 9), (9, 10)])
    """

    vocab_size: int
    world_size: int
    padded_vocab_size: Any = None  # an int, once it is made
    rows_per_rank: int = field(init=False, repr=False, compare=False)
    """Rows that each rank keeps, ``n = padded_vocab_size // world_size``."""

    def __post_init__(self) -> None:
        vocab_size = check_size("vocab_size", self.vocab_size)
        world_size = check_size("world_size", self.world_size)
        object.__setattr__(self, "vocab_size", vocab_size)
        object.__setattr__(self, "world_size", world_size)
        padded_vocab_size = _padded_size(vocab_size, world_size, self.padded_vocab_size)
        object.__setattr__(self, "padded_vocab_size", padded_vocab_size)
        object.__setattr__(self, "rows_per_rank", padded_vocab_size // world_size)

    @property
    def padding_rows(self) -> int:
        """Rows of padding, all ranks together."""
        return self.padded_vocab_size - self.vocab_size

    def owned_range(self, rank: int) -> tuple[int, int]:
        """Half-open range of ids owned by ``rank``, excluding padding; may be empty."""
        start = int(self.start(rank))
        return min(start, self.vocab_size), min(start + self.rows_per_rank, self.vocab_size)

    def start(self, rank: Any) -> Any:
        """First row of ``rank``. A rank given as a number is range-checked; a tensor or a tracer cannot be."""
        if isinstance(rank, np.generic) or not hasattr(rank, "dtype"):
            rank = check_rank(rank, self.world_size)
        elif not _dtype_name(rank).startswith(("int", "uint")):
            raise TypeError(f"rank must be an integer, got one of dtype {_dtype_name(rank)}")
        return rank * self.rows_per_rank

    def stop(self, rank: Any) -> Any:
        """One past the last row of ``rank``, padding rows included."""
        return self.start(rank) + self.rows_per_rank

    def has_padding(self, rank: int) -> bool:
        """Whether some of the rows that ``rank`` keeps are padding."""
        return int(self.stop(rank)) > self.vocab_size

    def locate(self, ids: Any, rank: Any) -> tuple[Any, Any]:
        """Find each id's row in the table of ``rank``, and whether the rank owns it.

        Args:
            ids: an array of ids, any integer dtype and shape.
            rank: whose table; a number, or an integer array without dimensions (a traced rank).

        Returns:
            ``(rows, owned)``, both shaped as ``ids``. ``rows`` are legal rows of the table, ``[0, rows_per_rank)``: that of
            the id where it is ``owned``, else the first.

        Raises:
            TypeError: ids or rank are not integers.
            ValueError: rank is a number outside ``[0, world_size)``.

        Example:
            >>> import numpy as np
            >>> from shared import VocabPartition
            >>> VocabPartition(vocab_size=12, world_size=3).locate(np.array([0, 4, 7, 12]), rank=1)
            (array([0, 0, 3, 0]), array([False,  True,  True, False]))
        """
        keys = self.keys(ids, rank)
        owned = keys < self.rows_per_rank
        return keys * owned, owned

    def keys(self, ids: Any, rank: Any) -> Any:
        """Each id's row in the table of ``rank``; one past its last row, ``rows_per_rank``, for foreign ids.

        Arguments and errors are those of ``locate``, which is built on this.

        Example:
            >>> import numpy as np
            >>> from shared import VocabPartition
            >>> VocabPartition(vocab_size=12, world_size=3).keys(np.array([0, 4, 7, 12]), rank=1)
            array([4, 0, 3, 4])
        """
        ids, n = widen(ids), self.rows_per_rank
        local = ids - self.start(rank)
        near = min(max(local, -1), n) if isinstance(local, int) else local.clip(-1, n)
        keys = near % (n + 1)  # -1 becomes n
        if self.padding_rows:
            keys = keys + (n - keys) * (ids >= self.vocab_size)
        return keys

    def owns(self, ids: Any, rank: Any) -> Any:
        """True where ``rank`` owns the id."""
        return self.locate(ids, rank)[1]

    def local_ids(self, ids: Any, rank: Any) -> Any:
        """Row numbers in the table of ``rank``; outside ``[0, rows_per_rank)`` for ids that it does not own."""
        ids = widen(ids)
        local = ids - self.start(rank)
        if self.padding_rows:  # an id in the padding must not name a row
            local = local - ((ids >= self.vocab_size) & (ids < self.padded_vocab_size)) * self.padded_vocab_size
        return local

    def owner(self, ids: Any) -> Any:
        """The rank that owns each id; -1 for ids outside the vocabulary."""
        ids = widen(ids)
        return (ids // self.rows_per_rank + 1) * self.is_valid(ids) - 1

    def is_valid(self, ids: Any) -> Any:
        """True where an id lies in ``[0, vocab_size)``."""
        ids = widen(ids)
        return (ids >= 0) & (ids < self.vocab_size)


def _dtype_name(array: Any) -> str:
    return str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")


def _padded_size(vocab_size: int, world_size: int, padded_vocab_size: Any) -> int:
    following = pad_vocab_size(vocab_size, world_size)
    if padded_vocab_size is None:
        over = vocab_size % world_size
        if over:
            raise ValueError(
                f"vocab_size must be divisible by world_size: vocab_size={vocab_size} over world_size={world_size} "
                f"leaves {over} rows over; the next size that divides is {following}: pass padded_vocab_size="
                f'{following} or padded_vocab_size="even", or choose a world_size that divides {vocab_size}'
            )
        return vocab_size
    if isinstance(padded_vocab_size, str):
        if padded_vocab_size != "even":
            raise ValueError(f'padded_vocab_size must be a number of rows or "even", got {padded_vocab_size!r}')
        return following
    size = as_int("padded_vocab_size", padded_vocab_size)
    if size < vocab_size or size % world_size:
        raise ValueError(
            f"padded_vocab_size must be at least vocab_size={vocab_size} and divisible by world_size={world_size}, "
            f"got {size}; the least such size is {following}"
        )
    return size
