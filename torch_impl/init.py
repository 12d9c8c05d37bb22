"""The initial numbers of a rank's rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import EmbeddingConfig
from shared.global_normal import normal_rows
from torch_impl.host_rows import fill_rows

__all__ = ["fill_normal"]


def fill_normal(weight: Tensor, config: EmbeddingConfig, rank: int) -> None:
    """Draw a rank's rows from a normal distribution, in place; padding rows and that of ``padding_idx`` become zero.

    Args:
        weight: the rank's rows, ``[n, e]``, on any device that has storage.
        config: ``init="per_rank"`` draws by ``nn.init.normal_``, in the table's dtype on its device, from a generator seeded
            ``init_base_seed + rank``; ``"global"`` makes row i a function of the seed and i alone
            (``shared.global_normal``).
        rank: whose rows these are.
    """
    partition, seed, mean, std = config.partition, config.init_base_seed, config.init_mean, config.init_std
    start, stop = partition.owned_range(rank)
    if config.init == "per_rank":
        generator = torch.Generator(weight.device).manual_seed(seed + rank)
        nn.init.normal_(weight, mean, std, generator=generator)
    else:

        def fill(first: int, rows: np.ndarray) -> None:
            first += start
            normal_rows(first, first + len(rows), rows.shape[1], rows.dtype, seed, mean, std, out=rows)

        fill_rows(weight.detach()[: stop - start], fill)
    with torch.no_grad():
        weight[stop - start :].zero_()
        if config.padding_idx is not None and start <= config.padding_idx < stop:
            weight[config.padding_idx - start].zero_()
