"""Options of the loss, and blocks of logits with a fixed order.

A *column* of the logits is a row of the table. Logits are computed block by block. Each block yields a few numbers per
token, which are merged in the order of a fixed tree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from shared.checks import as_int, as_number, check_choice
from shared.ids import first_invalid
from shared.partition import VocabPartition

__all__ = [
    "BLOCK_COLUMNS",
    "INVALID_TARGETS",
    "LOSS_REDUCTIONS",
    "LOSS_RETURNS",
    "ColumnBlocks",
    "LossOptions",
    "check_hidden",
    "check_logits_width",
    "check_softcap",
    "check_targets_shape",
    "check_targets_valid",
    "check_top_k",
    "check_uniform",
    "invalid_target_error",
    "logits_dtype_error",
    "merge_adjacent",
    "targets_type_error",
    "tree_size",
]

LOSS_REDUCTIONS = ("mean", "sum", "none")
"""Reductions of the losses of all tokens."""

LOSS_RETURNS = ("lse", "logprobs", "count")
"""Further results that a loss can return."""

INVALID_TARGETS = ("error", "ignore")
"""Result for a target outside the vocabulary: an IndexError, or no loss."""

BLOCK_COLUMNS = 1024
"""Most columns of a block: with 2048 tokens in float32 a block takes 8 MiB, which fits a CPU's cache."""

_ALIKE_WORLDS = 8
"""Worlds of 1, 2, 4 and 8 ranks share one tree, however small the vocabulary is."""


@dataclass(frozen=True)
class ColumnBlocks:
    """Blocks of a rank's columns: ``groups`` of ``group_columns`` columns, each in ``pieces``.

    A rank's range is halved until its width is odd or at most the limit: ``BLOCK_COLUMNS``, or an eighth of the padded
    vocabulary if that is less. The result is a *group*. A group wider than the limit is cut into pieces of ``columns``
    columns; its last piece may be narrower.

    For 1, 2, 4 and 8 ranks, blocks and order of merging are the same. Larger powers of two share them as long as each
    rank holds a whole group. For other world sizes, and for a vocabulary padded to another size, results agree within
    rounding.

    Example:
        >>> from shared import VocabPartition
        >>> from shared.head import ColumnBlocks
        >>> ColumnBlocks.of(VocabPartition(32000, 4))
        ColumnBlocks(groups=8, pieces=1, group_columns=1000, columns=1000)
        >>> ColumnBlocks.of(VocabPartition(50257, 1))
        ColumnBlocks(groups=1, pieces=50, group_columns=50257, columns=1006)
        >>> ColumnBlocks.of(VocabPartition(22, 2)).ranges(columns=9)
        [[(0, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 9)]]
    """

    groups: int
    pieces: int
    group_columns: int
    columns: int

    @classmethod
    def of(cls, partition: VocabPartition) -> Self:
        """Blocks of every rank of the partition."""
        limit = max(1, min(BLOCK_COLUMNS, partition.padded_vocab_size // _ALIKE_WORLDS))
        group = partition.rows_per_rank
        while group > limit and group % 2 == 0:
            group //= 2
        pieces = -(-group // limit)
        return cls(partition.rows_per_rank // group, pieces, group, -(-group // pieces))

    def ranges(self, columns: int) -> list[list[tuple[int, int]]]:
        """Half-open column ranges, group by group; empty from ``columns`` on."""
        edges = [min(piece * self.columns, self.group_columns) for piece in range(self.pieces + 1)]
        return [
            [(min(first + start, columns), min(first + stop, columns)) for start, stop in pairwise(edges)]
            for first in range(0, self.groups * self.group_columns, self.group_columns)
        ]


def tree_size(count: int) -> int:
    """Least power of two >= ``count``: leaves of the tree."""
    return 1 << (count - 1).bit_length()


def merge_adjacent(parts: Sequence[Any], merge: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """Merge adjacent entries of the first axis pairwise, until one is left.

    The first axis of all arrays has a power-of-two length (``tree_size``); unused entries hold the identity of ``merge``,
    which combines the even entries of all arrays with the odd ones. The results lack this axis.

    Example:
        >>> import numpy as np
        >>> from shared.head import merge_adjacent
        >>> merge_adjacent([np.array(["a", "b", "c", "d"], object)], lambda x, y: ["(" + x[0] + y[0] + ")"])
        ['((ab)(cd))']
    """
    merged = list(parts)
    while merged[0].shape[0] > 1:
        merged = list(merge([part[0::2] for part in merged], [part[1::2] for part in merged]))
    return [part[0] for part in merged]


@dataclass(frozen=True)
class LossOptions:
    """Validated options of a cross entropy.

    Args:
        ignore_index: target without loss and gradient, in ``[-2**63, 2**63)``.
        label_smoothing: share of the target spread over all ``vocab_size`` ids, in [0, 1).
        z_loss: factor of the squared logsumexp added to each token's loss; not negative.
        reduction: ``"mean"`` over the targets that count, ``"sum"``, or ``"none"``.
        invalid_targets: result for a target outside ``[0, vocab_size)``, one of ``INVALID_TARGETS``.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``; None: no bound.
        seq_dim: dimension of the targets along which hidden states are split over the ranks; None: not split.
        returns: further results, of ``LOSS_RETURNS``; kept as a tuple.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range.

    Example:
        >>> from shared.head import LossOptions
        >>> LossOptions(label_smoothing=0.1, returns=["lse"]).returns
        ('lse',)
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    invalid_targets: str = "error"
    softcap: float | None = None
    seq_dim: int | None = None
    returns: Sequence[str] = ()

    def __post_init__(self) -> None:
        ignore_index = as_int("ignore_index", self.ignore_index)
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must be in [-2**63, 2**63), got {ignore_index}")
        smoothing = as_number("label_smoothing", self.label_smoothing)
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing}")
        z_loss = as_number("z_loss", self.z_loss)
        if not 0 <= z_loss < math.inf:
            raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
        if not isinstance(self.returns, Sequence) or isinstance(self.returns, (str, bytes)):
            raise TypeError(f"returns must be a sequence of names, such as ('lse',), got {self.returns!r}")
        valid = {
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "z_loss": z_loss,
            "reduction": check_choice("reduction", self.reduction, LOSS_REDUCTIONS),
            "invalid_targets": check_choice("invalid_targets", self.invalid_targets, INVALID_TARGETS),
            "softcap": check_softcap(self.softcap),
            "seq_dim": None if self.seq_dim is None else as_int("seq_dim", self.seq_dim),
            "returns": tuple(check_choice("returns", name, LOSS_RETURNS) for name in self.returns),
        }
        for name, value in valid.items():
            object.__setattr__(self, name, value)


def check_softcap(softcap: object) -> float | None:
    """Validate ``softcap``: a finite number above 0, or None."""
    if softcap is None:
        return None
    number = as_number("softcap", softcap)
    if not 0 < number < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None for no bound, got {number}")
    return number


def check_top_k(k: object, vocab_size: int) -> int:
    """Validate ``k``, a number of ids in ``[1, vocab_size]``."""
    number = as_int("k", k)
    if not 1 <= number <= vocab_size:
        raise ValueError(f"k must be in [1, vocab_size] = [1, {vocab_size}], got {number}")
    return number


def check_hidden(hidden: Sequence[int], weight: Sequence[int], rows_per_rank: int) -> None:
    """Refuse shapes of hidden states and weight that do not match."""
    if len(weight) != 2 or weight[0] != rows_per_rank:
        raise ValueError(f"weight must hold the rank's own rows, [{rows_per_rank}, emb_size], got {tuple(weight)}")
    if len(hidden) < 1 or hidden[-1] != weight[1]:
        raise ValueError(f"hidden must be [*, emb_size] with emb_size={weight[1]} as weight has, got {tuple(hidden)}")


def check_logits_width(width: int, partition: VocabPartition) -> None:
    """Refuse gathered logits: every rank would count them."""
    if width != partition.rows_per_rank:
        raise ValueError(
            f"logits must have the rank's own {partition.rows_per_rank} columns, got {width}, with vocab_size="
            f"{partition.vocab_size} (padded to {partition.padded_vocab_size}) over {partition.world_size} ranks; "
            f"pass what parallel_logits returns, not logits gathered from other ranks"
        )


def check_uniform(valid: bool) -> None:
    """Raise ValueError unless ``valid``: all random numbers lie in [0, 1)."""
    if not valid:
        raise ValueError("uniform must hold numbers in [0, 1), such as torch.rand or jax.random.uniform draw")


def check_targets_shape(given: Sequence[int], tokens: Sequence[int], source: str, name: str = "targets") -> None:
    """Refuse targets of another shape than ``tokens``, taken from ``source``."""
    if tuple(given) != tuple(tokens):
        hint = "; where hidden is split along the sequence, pass seq_dim" if source == "hidden" else ""
        raise ValueError(
            f"{name} must be one a token, of shape {tuple(tokens)} as {source} has, got {tuple(given)}{hint}"
        )


def check_targets_valid(targets: np.ndarray, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for the first invalid target other than ``ignore_index``."""
    if found := first_invalid(np.where(targets == ignore_index, 0, targets), vocab_size):
        raise invalid_target_error(*found, vocab_size, ignore_index)


def invalid_target_error(value: int, position: Sequence[int], vocab_size: int, ignore_index: int) -> IndexError:
    """IndexError of ``invalid_targets="error"`` for one target and its position."""
    where = f"targets[{', '.join(map(str, position))}]" if position else "targets"
    return IndexError(
        f"{where} = {value} is outside the vocabulary [0, {vocab_size}) and is not ignore_index={ignore_index}; "
        f'correct the targets, or pass invalid_targets="ignore" to leave such tokens out'
    )


def targets_type_error(given: object, expected: str) -> TypeError:
    """TypeError for targets that are not integers, with their type or dtype."""
    return TypeError(f"targets must be {expected} of an integer dtype, got {given}; convert them first")


def logits_dtype_error(name: str, dtype: object, legal: str = "float16, bfloat16, float32 or float64") -> TypeError:
    """TypeError for an unsupported dtype of logits, hidden states or tables."""
    return TypeError(f"{name} must be {legal}, got {dtype}; convert it with .to or .astype")
