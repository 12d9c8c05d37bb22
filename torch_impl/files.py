"""A rank's rows from a table in files, and to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from shared.partition import VocabPartition
from shared.table_file import TableFile
from shared.table_writer import write_together
from torch_impl.agreement import gather_objects
from torch_impl.host_rows import fill_rows, memory_of

__all__ = ["fill_from_table", "write_table"]


def fill_from_table(weight: Tensor, table: TableFile, partition: VocabPartition, rank: int) -> None:
    """Read a rank's rows, in place and cast to its dtype; those of padding become zero.

    On a CPU the bytes go from the file to the tensor's memory; to another device, 16 MiB at a time.

    Args:
        weight: the rank's rows, ``[n, e]``.
        table: where they come from.
        partition: who owns what.
        rank: whose rows these are.

    Raises:
        ValueError: a file of the table is damaged.
    """
    start, stop = partition.owned_range(rank)
    rows = weight.detach()
    rows[stop - start :].zero_()
    fill_rows(rows[: stop - start], lambda first, memory: table.read_rows(start + first, memory))


def write_table(
    weight: Tensor,
    partition: VocabPartition,
    rank: int,
    group: dist.ProcessGroup | None,
    path: str | Path,
    tensor_name: str,
    force: bool,
) -> None:
    """Write a table whose ranks each have their rows; every rank of ``group`` calls this with the same arguments.

    Args:
        weight: the rank's rows, ``[n, e]``.
        partition: who owns what.
        rank: whose rows these are.
        group: the ranks; None where there is one.
        path, tensor_name, force: as in ``ParallelVocabEmbedding.save_table``.

    Raises:
        ValueError: on every rank, if any of them could not do its part.
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    rows, (start, _) = weight.detach(), partition.owned_range(rank)

    def fill(first: int, last: int, buffer: memoryview) -> None:
        part = rows[first - start : last - start].cpu().contiguous()
        buffer[:] = memory_of(part).reshape(-1).view(np.uint8).data

    def exchange(mine: Any) -> list[Any]:
        return [mine] if group is None else gather_objects(mine, group, "what each rank wrote of a table")

    write_together(
        path,
        tensor_name,
        dtype,
        weight.shape[1],
        partition,
        [rank],
        fill,
        force=force,
        process=rank,
        exchange=exchange,
    )
