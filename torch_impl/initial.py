"""The numbers that a rank's rows begin with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.global_normal import normal_rows
from shared.partition import VocabPartition
from torch_impl.rows import memory_of

__all__ = ["fill_normal"]

_BYTES = 1 << 24


def fill_normal(
    weight: Tensor, partition: VocabPartition, rank: int, init: str, mean: float, std: float, seed: int
) -> None:
    """Draw a rank's rows from a normal distribution, in place; rows of padding become zero.

    Args:
        weight: the rank's rows, ``[n, e]``, on any device that has storage.
        partition: who owns what.
        rank: whose rows these are.
        init: ``"per_rank"``: ``nn.init.normal_`` in the table's dtype on its device, from a generator seeded
            ``seed + rank``; ``"global"``: row i depends on the seed and i alone (``shared.global_normal``).
        mean, std: of the distribution.
        seed: what the numbers depend on.
    """
    start, stop = partition.owned_range(rank)
    if init == "per_rank":
        generator = torch.Generator(weight.device).manual_seed(seed + rank)
        nn.init.normal_(weight, mean, std, generator=generator)
    elif weight.device.type == "cpu" and weight.is_contiguous():
        rows = memory_of(weight)[: stop - start]
        normal_rows(start, stop, weight.shape[1], rows.dtype, seed, mean, std, out=rows)
    else:
        step = max(1, _BYTES // (weight.shape[1] * weight.element_size()))
        for first in range(start, stop, step):
            part = torch.empty(min(step, stop - first), weight.shape[1], dtype=weight.dtype)
            rows = memory_of(part)
            normal_rows(first, first + len(part), weight.shape[1], rows.dtype, seed, mean, std, out=rows)
            weight[first - start : first - start + len(part)].copy_(part)
    weight[stop - start :].zero_()
