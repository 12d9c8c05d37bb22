"""Ids and targets as the layer computes with them, and the checks of those outside the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.checks import ids_type_error
from shared.config import EmbeddingConfig
from shared.head import LossOptions, check_targets_valid, targets_type_error
from shared.ids import check_ids_valid, widen

__all__ = ["check_plain", "checked_ids", "checked_targets", "is_dtensor"]

_INTEGER_DTYPES = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without the import of those."""
    return type(value) is not Tensor and hasattr(value, "placements")


def check_plain(name: str, value: Any, remedy: str) -> None:
    """Refuse a DTensor where a rank's own tensor is meant.

    Raises:
        TypeError: it is one.
    """
    if is_dtensor(value):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor {value.placements}: pass {remedy}")


def checked_ids(ids: Any, config: EmbeddingConfig) -> Tensor:
    """Return the ids as int64; unsigned ones beyond it come out negative, outside every vocabulary.

    Args:
        ids: a tensor of integers.
        config: its ``invalid_ids="zero"`` lets ids outside ``[0, vocab_size)`` pass; ``"error"`` refuses them, for which the
            host waits for their device. Ids that each rank has of its own are checked where all ranks have gathered them.

    Raises:
        TypeError: ids are not a plain tensor of integers.
        IndexError: naming the first id outside the vocabulary in row-major order, its position and the legal range.
    """
    if not isinstance(ids, Tensor):
        raise ids_type_error(type(ids).__name__, "a torch.Tensor")
    check_plain("ids", ids, "full_tensor() of them, or to_local() where it is what this rank looks up")
    if ids.dtype not in _INTEGER_DTYPES:
        raise ids_type_error(f"dtype {ids.dtype}", "a tensor")
    if config.invalid_ids == "zero" or (config.reduction == "all_to_all" and config.world_size > 1):
        return ids.long()
    return torch.ops.pve.check_ids(ids, config.vocab_size)


def checked_targets(targets: Any, options: LossOptions, vocab_size: int) -> Tensor:
    """Return the targets as int64, with -1 for those that are ignored.

    Args:
        targets: a tensor of integers.
        options: ``ignore_index`` and ``invalid_targets``; with ``"error"`` the host waits for the targets' device.
        vocab_size: the first id that is not valid.

    Raises:
        TypeError: targets are not a tensor of integers.
        IndexError: naming the first target outside the vocabulary that is not ``ignore_index``.
    """
    if not isinstance(targets, Tensor):
        raise targets_type_error(type(targets).__name__, "a torch.Tensor")
    if targets.dtype not in _INTEGER_DTYPES:
        raise targets_type_error(f"dtype {targets.dtype}", "a tensor")
    if options.invalid_targets == "error":
        return torch.ops.pve.check_targets(targets, vocab_size, options.ignore_index)
    return _without_ignored(targets, vocab_size, options.ignore_index)


def _without_ignored(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    wide = widen(targets)
    return torch.where((wide >= 0) & (wide < vocab_size) & (wide != ignore_index), wide, -1)


@torch.library.custom_op("pve::check_targets", mutates_args=())
def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    """``checked_targets`` as an operator that compiled graphs can hold."""
    known = _without_ignored(targets, vocab_size, ignore_index)
    if ((known < 0) & (widen(targets) != ignore_index)).any():
        check_targets_valid(targets.cpu().numpy(), vocab_size, ignore_index)
    return known


@_check_targets.register_fake
def _(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return torch.empty_like(targets, dtype=torch.int64)


@torch.library.custom_op("pve::check_ids", mutates_args=())
def _check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids as int64 once all of them are known to be valid, as an operator that compiled graphs can hold."""
    wide = widen(ids)
    if ((wide < 0) | (wide >= vocab_size)).any():
        check_ids_valid(ids.cpu().numpy(), vocab_size)
    return wide.clone() if wide is ids else wide


@_check_ids.register_fake
def _(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int64)


@_check_ids.register_vmap
def _(info: Any, in_dims: tuple[int | None, None], ids: Tensor, vocab_size: int) -> tuple[Tensor, int | None]:
    return torch.ops.pve.check_ids(ids, vocab_size), in_dims[0]
