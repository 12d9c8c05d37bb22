"""Rules of padding a vocabulary, as the command line writes them."""

import re

from shared.partition import pad_vocab_size

__all__ = ["RULES", "RULE_HELP", "padded_by_rule"]

RULES = ("even", "multiple-of:64", "128*w")
"""Rules in use: the least size that divides evenly, vLLM's, Megatron-LM's."""

RULE_HELP = (
    "rows including padding: a number, even (the least size divisible by W), multiple-of:M (divisible by M too; vLLM: 64), "
    "or M*w (divisible by M times W; Megatron-LM: 128*w)"
)


def padded_by_rule(rule: str | None, vocab_size: int, world_size: int) -> int | None:
    """Padded size by a rule of the command line; None for None.

    Raises:
        ValueError: the rule is none of these.

    Example:
        >>> from shared.padding_rules import RULES, padded_by_rule
        >>> [padded_by_rule(rule, 50257, 8) for rule in RULES]
        [50264, 50304, 51200]
    """
    if rule is None:
        return None
    if rule == "even":
        return pad_vocab_size(vocab_size, world_size)
    if found := re.fullmatch(r"multiple-of:(\d{1,18})", rule):
        return pad_vocab_size(vocab_size, world_size, int(found[1]))
    if found := re.fullmatch(r"(\d{1,18})\*w", rule):
        return pad_vocab_size(vocab_size, world_size, int(found[1]) * world_size)
    if re.fullmatch(r"\d{1,18}", rule):
        return int(rule)
    raise ValueError(f"--padded-vocab-size must be a number of rows, even, multiple-of:M or M*w, got {rule!r}")
