"""Options of the layers, declared and validated once."""

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
from shared.partition import PaddedSize, VocabPartition

__all__ = ["LOOKUP_OPTIONS", "OPTIONS", "EmbeddingConfig"]


@dataclass(frozen=True)
class EmbeddingConfig:
    """Validated options of a vocabulary-parallel embedding.

    Equality and hash depend on the options of the lookup only, not on ``init``, ``init_*`` and ``check``.

    Args:
        vocab_size: rows of the whole table, padding excluded.
        emb_size: columns of the table.
        world_size: number of ranks.
        padded_vocab_size: rows including padding; ``"even"`` for the least size divisible by ``world_size``. None: no
            padding.
        reduction: result of a lookup, one of ``shared.checks.REDUCTIONS``.
        exchange: how rows travel between ranks, one of ``shared.checks.EXCHANGES``.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits; for ``pve`` also ``"all_to_all"``.
        invalid_ids: result for an id outside the vocabulary, one of ``shared.checks.INVALID_IDS``.
        padding_idx: global id whose row is zero at first and gets no gradient; or None.
        sparse: make the gradient a sparse tensor (PyTorch).
        gradient_accumulation_fusion: add gradients to the parameter's buffer in place (PyTorch).
        init_mean, init_std: mean and standard deviation of the initial normal distribution.
        init_base_seed: rank r draws from a generator seeded ``init_base_seed + r``.
        init: one of ``shared.checks.INITS``; a callable from row numbers to rows; or None to leave the table empty.
        check: compare configuration and ids across ranks before every lookup.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: an option is out of range, or two options contradict each other.

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
    padded_vocab_size: PaddedSize = None  # type: ignore[assignment]
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
    """Ownership of the rows."""
    text: str = field(init=False, repr=False, compare=False)
    """All options in one line, for operators that take only strings and numbers; a callable ``init`` becomes None."""

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
        plain = [f"{name!r}: {None if callable(value) else value!r}" for name, value in self.as_dict().items()]
        object.__setattr__(self, "text", "{" + ", ".join(plain) + "}")
        if self.sparse and self.gradient_accumulation_fusion:
            raise ValueError("gradient_accumulation_fusion must be False with sparse=True, got True; set one of them")

    def as_dict(self) -> dict[str, Any]:
        """Options by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def changes(self) -> dict[str, Any]:
        """Options that differ from their defaults; ``padded_vocab_size`` only where there is padding."""
        changed = {}
        for each in fields(self):
            default = self.vocab_size if each.name == "padded_vocab_size" else each.default
            shown = each.init and default is not MISSING and each.name != "world_size"
            if shown and getattr(self, each.name) != default:
                changed[each.name] = getattr(self, each.name)
        return changed

    def agreement(self) -> dict[str, str]:
        """Options that all ranks must agree on, as text by name."""
        return {name: str(getattr(self, name)) for name in LOOKUP_OPTIONS}

    @staticmethod
    @lru_cache
    def from_text(text: str) -> "EmbeddingConfig":
        """Parse ``text`` back to a configuration."""
        return EmbeddingConfig(**ast.literal_eval(text))


OPTIONS = tuple(each.name for each in fields(EmbeddingConfig) if each.init)
"""Names of all options."""

LOOKUP_OPTIONS = tuple(each.name for each in fields(EmbeddingConfig) if each.init and each.compare)
"""Names of the options that a lookup depends on, on which all ranks must agree."""
