"""Which rank owns which row of a vocabulary table: the one place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.checks import check_rank, check_size
from shared.ids import widen

__all__ = ["VocabPartition"]


@dataclass(frozen=True)
class VocabPartition:
    """A vocabulary of ``vocab_size`` rows cut into ``world_size`` equal, contiguous ranges.

    Rank r owns the half-open range ``[start(r), stop(r))`` of ``rows_per_rank`` rows. The methods that take ids use only
    plain operators (``- >= < // *``), so NumPy arrays, torch tensors, JAX tracers and Python ints all go through the very
    same code; every integer dtype is widened first and none wraps.

    Args:
        vocab_size: rows of the whole table.
        world_size: number of ranks; must divide ``vocab_size``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1, or ``world_size`` does not divide ``vocab_size``.

    An id outside ``[0, vocab_size)`` is owned by no rank.

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
    """

    vocab_size: int
    world_size: int

    def __post_init__(self) -> None:
        vocab_size = check_size("vocab_size", self.vocab_size)
        world_size = check_size("world_size", self.world_size)
        object.__setattr__(self, "vocab_size", vocab_size)
        object.__setattr__(self, "world_size", world_size)
        over = vocab_size % world_size
        if over:
            following = vocab_size + world_size - over
            raise ValueError(
                f"vocab_size must be divisible by world_size: vocab_size={vocab_size} over world_size={world_size} "
                f"leaves {over} rows over; the next size that divides is {following}, "
                f"or choose a world_size that divides {vocab_size}"
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows that each rank keeps, ``n = vocab_size // world_size``."""
        return self.vocab_size // self.world_size

    def start(self, rank: Any) -> Any:
        """First id of ``rank``. A rank given as a number is range-checked; a traced one (JAX) cannot be."""
        if isinstance(rank, (int, np.integer)):
            rank = check_rank(rank, self.world_size)
        return rank * self.rows_per_rank

    def stop(self, rank: Any) -> Any:
        """One past the last id of ``rank``."""
        return self.start(rank) + self.rows_per_rank

    def is_valid(self, ids: Any) -> Any:
        """True where an id lies in ``[0, vocab_size)``."""
        ids = widen(ids)
        return (ids >= 0) & (ids < self.vocab_size)

    def owner(self, ids: Any) -> Any:
        """The rank that owns each id; -1 for ids outside the vocabulary."""
        ids = widen(ids)
        valid = (ids >= 0) & (ids < self.vocab_size)
        return (ids // self.rows_per_rank + 1) * valid - 1

    def owns(self, ids: Any, rank: Any) -> Any:
        """True where ``rank`` owns the id."""
        ids = widen(ids)
        start = self.start(rank)
        return (ids >= start) & (ids < start + self.rows_per_rank)

    def local_ids(self, ids: Any, rank: Any) -> Any:
        """Row numbers in the table of ``rank``; for ids it does not own they lie outside ``[0, rows_per_rank)``."""
        return widen(ids) - self.start(rank)
