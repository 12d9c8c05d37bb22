"""Every option of both layers: declared once, validated once."""

from __future__ import annotations

import ast
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any

from shared.checks import (
    EXCHANGES,
    INVALID_IDS,
    REDUCTIONS,
    as_int,
    check_choice,
    check_flag,
    check_init,
    check_normal,
    check_padding_idx,
    check_seed,
    check_size,
)
from shared.partition import VocabPartition

__all__ = ["LOOKUP_OPTIONS", "OPTIONS", "EmbeddingConfig"]


@dataclass(frozen=True)
class EmbeddingConfig:
    """The options of a vocabulary-parallel embedding, validated.

    Two configurations are equal, and hash alike, if their layers look ids up alike: what only construction and checks need
    (``init_*``, ``init``, ``check``) takes no part in that.

    Args:
        vocab_size: rows of the whole table, all ranks together.
        emb_size: columns of the table.
        world_size: number of ranks.
        padded_vocab_size: rows including padding; ``"even"`` finds the least size that ``world_size`` divides. None: no
            padding.
        reduction: what a lookup returns: ``"none"``, ``"all_reduce"`` or ``"reduce_scatter"``.
        exchange: how rows travel: ``"dense"``, ``"routed"`` or ``"auto"``.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits.
        invalid_ids: what an id outside the vocabulary gives: ``"zero"`` or ``"error"``.
        padding_idx: a global id whose row starts at zero and gets no gradient; None: none.
        sparse: make the gradient a sparse tensor (PyTorch).
        gradient_accumulation_fusion: add gradients straight to the parameter's buffer (PyTorch).
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws from a generator seeded ``init_base_seed + r``.
        init: what the initial numbers depend on: ``"per_rank"`` or ``"global"``; a callable of row numbers that returns
            rows; None for no numbers.
        check: have the ranks compare what they compute before every lookup.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two contradict each other.

    Example:
        >>> from shared import EmbeddingConfig
        >>> config = EmbeddingConfig(10, 4, world_size=4, padded_vocab_size="even", reduction="all_reduce")
        >>> config.partition.owned_range(3), config.changes()
        ((9, 10), {'padded_vocab_size': 12, 'reduction': 'all_reduce'})
        >>> EmbeddingConfig.from_text(config.text) == config
        True
    """

    vocab_size: int
    emb_size: int
    world_size: int = 1
    padded_vocab_size: Any = None  # an int once it is made
    reduction: str = "none"
    exchange: str = "auto"
    seq_dim: int = -1
    invalid_ids: str = "zero"
    padding_idx: int | None = None
    sparse: bool = False
    gradient_accumulation_fusion: bool = False
    init_mean: float = field(default=0.0, compare=False)
    init_std: float = field(default=1.0, compare=False)
    init_base_seed: int = field(default=42, compare=False)
    init: Any = field(default="per_rank", compare=False)
    check: bool = field(default=False, compare=False)
    partition: VocabPartition = field(init=False, repr=False, compare=False)
    """Who owns what."""
    text: str = field(init=False, repr=False, compare=False)
    """All options in one line, which ``from_text`` reads: an argument that an operator of a compiled graph can take.

    A callable is None in it: no lookup needs one.
    """

    def __post_init__(self) -> None:
        partition = VocabPartition(self.vocab_size, self.world_size, self.padded_vocab_size)
        mean, std = check_normal(self.init_mean, self.init_std)
        valid = {
            "partition": partition,
            "vocab_size": partition.vocab_size,
            "world_size": partition.world_size,
            "padded_vocab_size": partition.padded_vocab_size,
            "emb_size": check_size("emb_size", self.emb_size),
            "reduction": check_choice("reduction", self.reduction, REDUCTIONS),
            "exchange": check_choice("exchange", self.exchange, EXCHANGES),
            "seq_dim": as_int("seq_dim", self.seq_dim),
            "invalid_ids": check_choice("invalid_ids", self.invalid_ids, INVALID_IDS),
            "padding_idx": check_padding_idx(self.padding_idx, partition.vocab_size),
            "init_mean": mean,
            "init_std": std,
            "init_base_seed": check_seed(self.init_base_seed, partition.world_size),
            "init": check_init(self.init),
        }
        for name in ("sparse", "gradient_accumulation_fusion", "check"):
            valid[name] = check_flag(name, getattr(self, name))
        for name, value in valid.items():
            object.__setattr__(self, name, value)
        options = ", ".join(
            [f"{name!r}: {None if callable(value) else value!r}" for name, value in self.as_dict().items()]
        )
        object.__setattr__(self, "text", "{" + options + "}")
        if self.sparse and self.gradient_accumulation_fusion:
            raise ValueError("gradient_accumulation_fusion must be False with sparse=True, whose gradient is no buffer")

    def as_dict(self) -> dict[str, Any]:
        """The options by name, as plain values."""
        return {name: getattr(self, name) for name in OPTIONS}

    def changes(self) -> dict[str, Any]:
        """The options that differ from their defaults, sizes left out."""
        changed = {}
        for each in fields(self):
            default = self.vocab_size if each.name == "padded_vocab_size" else each.default
            shown = each.init and default is not MISSING and each.name != "world_size"
            if shown and getattr(self, each.name) != default:
                changed[each.name] = getattr(self, each.name)
        return changed

    def agreement(self) -> dict[str, str]:
        """What all ranks must agree on, as text by name."""
        return {name: str(getattr(self, name)) for name in LOOKUP_OPTIONS}

    @staticmethod
    @lru_cache
    def from_text(text: str) -> EmbeddingConfig:
        """The configuration whose ``text`` this is."""
        return EmbeddingConfig(**ast.literal_eval(text))


OPTIONS = tuple(each.name for each in fields(EmbeddingConfig) if each.init)
"""The names of all options."""

LOOKUP_OPTIONS = tuple(each.name for each in fields(EmbeddingConfig) if each.init and each.compare)
"""Those that a lookup depends on, which all ranks must agree on."""
