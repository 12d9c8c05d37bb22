"""A rank's rows as torch.distributed.checkpoint stores and loads them: as rows of one whole, unpadded table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shared.partition import VocabPartition
from torch_impl.further_split import rows_here
from torch_impl.private_api import tensor_without_storage

__all__ = ["TableRows"]


class TableRows(Tensor):
    """A rank's rows of a table ``[vocab_size, e]``, for torch.distributed.checkpoint; not for computing.

    It has the shape of the whole table, so that any number of ranks with any padding can load what others saved, and the
    storage of one rank's rows, which loading writes to. It follows the protocol by which DTensor tells that library what
    it has; a DTensor itself could only be split as DTensor splits, ``ceil(vocab_size / world_size)`` rows a rank.

    Args:
        rows: the rank's rows, ``[n, e]``, those of padding included; shared, not copied. Those that ``fully_shard`` has
            split further are this process's part.
        partition: who owns what.
        rank: whose rows these are.
    """

    _rows: Tensor
    _start: int

    @staticmethod
    def __new__(cls, rows: Tensor, partition: VocabPartition, rank: int) -> TableRows:
        size = torch.Size([partition.vocab_size, rows.shape[1]])
        self: TableRows = tensor_without_storage(cls, size, rows_here(rows)[0])
        return self

    def __init__(self, rows: Tensor, partition: VocabPartition, rank: int) -> None:
        start, stop = partition.owned_range(rank)
        part, first = rows_here(rows)
        self._start = min(start + first, stop)
        self._rows = part[: stop - self._start]

    def __repr__(self) -> str:  # type: ignore[override]
        rows = f"{self._start}:{self._start + len(self._rows)}"
        return f"TableRows([{rows}] of {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"TableRows is for torch.distributed.checkpoint's save and load alone, not for {func}")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self._start, 0]), sizes=self._rows.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not len(self._rows):
            return []
        data = TensorWriteData(self._chunk(), TensorProperties(dtype=self.dtype), self.shape)
        index = MetadataIndex(fqn, torch.Size([self._start, 0]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if len(self._rows) else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if index.offset != torch.Size([self._start, 0]):
            raise ValueError(f"this rank has rows from {self._start} on, not from {index.offset}")
        return self._rows
