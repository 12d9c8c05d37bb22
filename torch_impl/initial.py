"""The numbers that a rank's rows begin with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shared.global_normal import normal_rows
from shared.partition import VocabPartition
from torch_impl.local.memory import fill_rows

__all__ = ["fill_normal"]


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
    else:

        def fill(first: int, rows: np.ndarray) -> None:
            first += start
            normal_rows(first, first + len(rows), rows.shape[1], rows.dtype, seed, mean, std, out=rows)

        fill_rows(weight.detach()[: stop - start], fill)
    if partition.padding_rows:
        weight[stop - start :].zero_()
