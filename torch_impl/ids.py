"""Ids as the layer computes with them, and the check of ``invalid_ids="error"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.checks import ids_type_error
from shared.ids import check_ids_valid, widen

__all__ = ["as_ids", "check_ids"]

_INTEGER_DTYPES = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def as_ids(ids: Any) -> Tensor:
    """The ids as int64; unsigned ones beyond it come out negative, outside every vocabulary.

    Raises:
        TypeError: ids are not a tensor of integers.
    """
    return ids if type(ids) is Tensor and ids.dtype == torch.int64 else widen(_checked_tensor(ids))


def check_ids(ids: Any, vocab_size: int) -> Tensor:
    """The ids as int64, once all of them are known to be valid, for which the host waits for their device.

    Raises:
        IndexError: naming the first id outside ``[0, vocab_size)`` in row-major order, its position and the legal range.
        TypeError: ids are not a tensor of integers.
    """
    return torch.ops.pve.check_ids(_checked_tensor(ids), vocab_size)


def _checked_tensor(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor):
        raise ids_type_error(type(ids).__name__, "a torch.Tensor")
    if ids.dtype not in _INTEGER_DTYPES:
        raise ids_type_error(f"dtype {ids.dtype}", "a tensor")
    return ids


@torch.library.custom_op("pve::check_ids", mutates_args=())
def _check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """``check_ids`` as an operator, so that compiled graphs can hold it."""
    wide = widen(ids)
    if ((wide < 0) | (wide >= vocab_size)).any():
        check_ids_valid(ids.cpu().numpy(), vocab_size)
    return wide.clone() if wide is ids else wide


@_check_ids.register_fake
def _(ids: Tensor, vocab_size: int) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int64)
