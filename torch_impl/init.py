"""Initial numbers of a rank's rows."""

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import EmbeddingConfig
from shared.global_normal import normal_rows
from torch_impl.host_rows import fill_rows

__all__ = ["fill_table"]


def fill_table(rows: Tensor, first: int, config: EmbeddingConfig, rank: int) -> None:
    """Initialise a rank's rows in place; padding and ``padding_idx`` become zero.

    Args:
        rows: the rank's rows, ``[n, e]``, or a part of them, on a device with storage.
        first: number of the part's first row within the rank's rows.
        config: ``init="per_rank"`` draws with ``nn.init.normal_`` in the table's dtype on its device, from a generator
            seeded ``init_base_seed + rank``. ``"global"`` derives row i from the seed and i alone
            (``shared.global_normal``). A callable returns the rows. None leaves them unchanged.
        rank: the owner of the rows.

    Raises:
        TypeError: the callable did not return a tensor.
        ValueError: the callable did not return one row for each row number.
    """
    partition, seed, mean, std = config.partition, config.init_base_seed, config.init_mean, config.init_std
    start, stop = partition.owned_range(rank)
    begin = min(start + first, stop)
    owned = rows[: stop - begin]
    if callable(config.init):
        numbers = torch.arange(begin, begin + len(owned), device=rows.device)
        with torch.no_grad():
            owned.copy_(_checked_rows(config.init(numbers), list(owned.shape)))
    elif config.init == "per_rank":
        generator = torch.Generator(rows.device).manual_seed(seed + rank)
        if len(rows) == partition.rows_per_rank:
            nn.init.normal_(rows, mean, std, generator=generator)
        else:  # a part gets its numbers of the whole
            whole = torch.empty(partition.rows_per_rank, rows.shape[1], dtype=rows.dtype, device=rows.device)
            rows.copy_(nn.init.normal_(whole, mean, std, generator=generator)[first : first + len(rows)])
    elif config.init == "global":

        def fill(number: int, part: np.ndarray) -> None:
            number += begin
            normal_rows(number, number + len(part), part.shape[1], part.dtype, seed, mean, std, out=part)

        fill_rows(owned, fill)
    rows[len(owned) :].zero_()
    if config.padding_idx is not None and begin <= config.padding_idx < begin + len(owned):
        rows[config.padding_idx - begin].zero_()


def _checked_rows(rows: object, shape: list[int]) -> Tensor:
    if not isinstance(rows, Tensor):
        raise TypeError(f"init must return a tensor, got {type(rows).__name__}")
    if list(rows.shape) != shape:
        raise ValueError(
            f"init must return a row for each of the row numbers that it is given, {shape}, got {list(rows.shape)}"
        )
    return rows
