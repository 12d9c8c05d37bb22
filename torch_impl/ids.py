"""Ids and targets: dtype checks, range checks, widening to int64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from shared.checks import ids_type_error
from shared.config import EmbeddingConfig
from shared.head import LossOptions, check_targets_valid, targets_type_error
from shared.ids import check_ids_valid, widen

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["check_plain", "checked_ids", "checked_targets", "is_dtensor"]

_INTEGER_DTYPES = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, found without importing that class."""
    return type(value) is not Tensor and hasattr(value, "placements")


def check_plain(name: str, value: object, remedy: str) -> None:
    """Refuse a DTensor where a plain tensor is required.

    Raises:
        TypeError: ``value`` is a DTensor.
    """
    if is_dtensor(value):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor {value.placements}: pass {remedy}")


def checked_ids(ids: object, config: EmbeddingConfig) -> Tensor:
    """Validate ids and widen them to int64.

    Unsigned ids beyond int64 become negative, hence invalid.

    Args:
        ids: a tensor of integers.
        config: ``invalid_ids="error"`` checks the range; the host then waits for the device. Ids of ``"all_to_all"`` are
            checked after the ranks have gathered them.

    Raises:
        TypeError: ids are not a plain tensor of integers.
        IndexError: names the first invalid id in row-major order, its position and the legal range.
    """
    if not isinstance(ids, Tensor):
        raise ids_type_error(type(ids).__name__, "a torch.Tensor")
    check_plain("ids", ids, "full_tensor() of them, or to_local() if this rank looks up its own part")
    if ids.dtype not in _INTEGER_DTYPES:
        raise ids_type_error(f"dtype {ids.dtype}", "a tensor")
    if config.invalid_ids == "zero" or (config.reduction == "all_to_all" and config.world_size > 1):
        return ids.long()
    return torch.ops.pve.check_ids(ids, config.vocab_size)


def checked_targets(targets: object, options: LossOptions, vocab_size: int) -> Tensor:
    """Validate targets and widen them to int64; ignored ones become -1.

    Args:
        targets: a tensor of integers.
        options: ``ignore_index`` and ``invalid_targets``; with ``"error"`` the host waits for the device.
        vocab_size: targets must be below it.

    Raises:
        TypeError: targets are not a tensor of integers.
        IndexError: names the first target outside the vocabulary that is not ``ignore_index``.
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
    """``checked_targets`` as a custom operator."""
    known = _without_ignored(targets, vocab_size, ignore_index)
    invalid = known < 0
    if targets.dtype != torch.uint64 or ignore_index >= 0:  # widening wraps large targets to negative numbers
        invalid &= widen(targets) != ignore_index
    if invalid.any():
        check_targets_valid(targets.cpu().numpy(), vocab_size, ignore_index)
    return known


@_check_targets.register_fake
def _(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return torch.empty_like(targets, dtype=torch.int64)


@torch.library.custom_op("pve::check_ids", mutates_args=())
def _check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Range check of ids as a custom operator."""
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
