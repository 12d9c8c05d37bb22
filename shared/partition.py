"""Ownership and padding of the rows of a vocabulary table."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.checks import as_int, check_rank, check_size
from shared.ids import Ids, IdsT, widen

__all__ = ["PaddedSize", "VocabPartition", "pad_vocab_size"]

if TYPE_CHECKING:

    class PaddedSize:
        """Field that takes an int, ``"even"`` or None and holds an int."""

        def __get__(self, instance: object, owner: type | None = None) -> int: ...
        def __set__(self, instance: object, value: int | str | None) -> None: ...

else:
    PaddedSize = int


def pad_vocab_size(vocab_size: int, world_size: int, multiple_of: int = 1) -> int:
    """Least size >= ``vocab_size`` divisible by ``world_size`` and ``multiple_of``.

    Args:
        vocab_size: rows of the whole table.
        world_size: number of ranks.
        multiple_of: a further divisor: 64 in vLLM, ``128 * world_size`` in Megatron-LM.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.

    Source: ``--make-vocab-size-divisible-by`` of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> from shared import pad_vocab_size
        >>> pad_vocab_size(50257, 8), pad_vocab_size(50257, 8, 64), pad_vocab_size(50257, 8, 128 * 8)
        (50264, 50304, 51200)
    """
    rows = check_size("vocab_size", vocab_size)
    step = math.lcm(check_size("world_size", world_size), check_size("multiple_of", multiple_of))
    return -(-rows // step) * step


@dataclass(frozen=True)
class VocabPartition:
    """A vocabulary cut into ``world_size`` equal, contiguous ranges of rows.

    Rank r holds the half-open range ``[start(r), stop(r))`` of ``rows_per_rank`` rows. Rows from ``vocab_size`` on are
    padding and belong to no id. An id outside ``[0, vocab_size)`` is owned by no rank.

    Methods that take ids use plain operators only, so the same code serves NumPy arrays, torch tensors, JAX tracers and
    Python ints. Ids of every integer dtype are widened first.

    Args:
        vocab_size: rows of the whole table, padding excluded.
        world_size: number of ranks.
        padded_vocab_size: rows including padding, divisible by ``world_size``; ``"even"`` for the least such size. None: no
            padding, and ``vocab_size`` must be divisible by ``world_size``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1, ``padded_vocab_size`` is below ``vocab_size``, or the rows do not divide evenly.

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
    padded_vocab_size: PaddedSize = None  # type: ignore[assignment]
    rows_per_rank: int = field(init=False, repr=False, compare=False)
    """Rows held by each rank, ``n = padded_vocab_size // world_size``."""

    def __post_init__(self) -> None:
        vocab_size = check_size("vocab_size", self.vocab_size)
        world_size = check_size("world_size", self.world_size)
        padded_vocab_size = _padded_size(vocab_size, world_size, self.padded_vocab_size)
        object.__setattr__(self, "vocab_size", vocab_size)
        object.__setattr__(self, "world_size", world_size)
        object.__setattr__(self, "padded_vocab_size", padded_vocab_size)
        object.__setattr__(self, "rows_per_rank", padded_vocab_size // world_size)

    @property
    def padding_rows(self) -> int:
        """Padding rows of all ranks together."""
        return self.padded_vocab_size - self.vocab_size

    def owned_range(self, rank: int) -> tuple[int, int]:
        """Half-open range of ids owned by ``rank``, excluding padding; may be empty."""
        start = int(self.start(rank))
        return min(start, self.vocab_size), min(start + self.rows_per_rank, self.vocab_size)

    def start(self, rank: IdsT) -> IdsT:
        """First row of ``rank``; an array or tracer is not range-checked."""
        number: Any = rank
        if isinstance(number, np.generic) or not hasattr(number, "dtype"):
            number = check_rank(number, self.world_size)
        else:
            dtype = str(getattr(number.dtype, "name", number.dtype)).removeprefix("torch.")
            if not dtype.startswith(("int", "uint")):
                raise TypeError(f"rank must be an integer, got one of dtype {dtype}")
        return number * self.rows_per_rank

    def stop(self, rank: IdsT) -> IdsT:
        """One past the last row of ``rank``, padding included."""
        return self.start(rank) + self.rows_per_rank

    def locate(self, ids: IdsT, rank: Ids) -> tuple[IdsT, IdsT]:
        """Find each id's row on ``rank``, and whether the rank owns it.

        Args:
            ids: any shape and integer dtype.
            rank: a number, or a 0-d integer array (a traced rank).

        Returns:
            ``(rows, owned)``, shaped as ``ids``. ``rows`` lie in ``[0, rows_per_rank)``; those of foreign ids are 0.

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

    def keys(self, ids: IdsT, rank: Ids) -> IdsT:
        """Each id's row in the table of ``rank``; ``rows_per_rank`` for foreign ids.

        Arguments and errors are those of ``locate``.

        Example:
            >>> import numpy as np
            >>> from shared import VocabPartition
            >>> VocabPartition(vocab_size=12, world_size=3).keys(np.array([0, 4, 7, 12]), rank=1)
            array([4, 0, 3, 4])
        """
        ids, n = widen(ids), self.rows_per_rank
        local: Any = ids - self.start(rank)
        near: Any = min(max(local, -1), n) if isinstance(local, int) else local.clip(-1, n)
        keys = near % (n + 1)  # -1 becomes n
        if self.padding_rows:
            keys = keys + (n - keys) * (ids >= self.vocab_size)
        return keys

    def owns(self, ids: IdsT, rank: Ids) -> IdsT:
        """Whether ``rank`` owns each id."""
        return self.locate(ids, rank)[1]

    def has_padding(self, rank: int) -> bool:
        """Whether some of the rows of ``rank`` are padding."""
        return int(self.stop(rank)) > self.vocab_size

    def local_ids(self, ids: IdsT, rank: Ids) -> IdsT:
        """Row numbers in the table of ``rank``.

        Those of foreign ids lie outside ``[0, rows_per_rank)``.
        """
        ids = widen(ids)
        local: Any = ids - self.start(rank)
        if self.padding_rows:  # an id in the padding must not name a row
            local = local - ((ids >= self.vocab_size) & (ids < self.padded_vocab_size)) * self.padded_vocab_size
        return local

    def owner(self, ids: IdsT) -> IdsT:
        """Rank that owns each id; -1 for ids outside the vocabulary."""
        ids = widen(ids)
        return (ids // self.rows_per_rank + 1) * self.is_valid(ids) - 1

    def is_valid(self, ids: IdsT) -> IdsT:
        """Whether each id lies in ``[0, vocab_size)``."""
        ids = widen(ids)
        return (ids >= 0) & (ids < self.vocab_size)


def _padded_size(vocab_size: int, world_size: int, padded_vocab_size: int | str | None) -> int:
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
