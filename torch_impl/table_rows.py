"""A rank's rows as a tensor that torch.distributed.checkpoint can store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.partition import VocabPartition
from torch_impl.further_split import rows_here
from torch_impl.private_api import tensor_without_storage

if TYPE_CHECKING:  # importing it takes half a second
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["TableRows"]


class TableRows(Tensor):
    """A rank's rows of a table ``[vocab_size, ...]``, for torch.distributed.checkpoint only.

    The shape is that of the whole, unpadded table, so that any number of ranks with any padding can load it. The
    storage is the rank's rows, which loading overwrites. The class follows the protocol by which DTensor describes its
    chunks to that library. A DTensor itself would have to hold ``ceil(vocab_size / world_size)`` rows per rank.

    Args:
        rows: the rank's rows, ``[n, ...]``, padding included; shared, not copied. ``fully_shard`` may have split them
            further.
        partition: ownership of the rows.
        rank: the owner of ``rows``.
    """

    rank_rows: Tensor
    """The rank's rows as given."""
    owned: list[int]
    """Start and stop of the owned range, and ``vocab_size``."""
    _rows: Tensor
    _start: int

    @staticmethod
    def __new__(cls, rows: Tensor, partition: VocabPartition, rank: int) -> TableRows:
        size = torch.Size([partition.vocab_size, *rows.shape[1:]])
        return tensor_without_storage(cls, size, rows_here(rows)[0])

    def __init__(self, rows: Tensor, partition: VocabPartition, rank: int) -> None:
        start, stop = partition.owned_range(rank)
        part, first = rows_here(rows)
        if len(rows) == partition.padded_vocab_size:  # a DTensor of all ranks' rows
            first -= partition.start(rank)
        self.rank_rows, self.owned = rows.detach(), [start, stop, partition.vocab_size]
        self._start = min(start + first, stop)
        self._rows = part[: stop - self._start]

    def __repr__(self) -> str:  # type: ignore[override]
        rows = f"{self._start}:{self._start + len(self._rows)}"
        return f"TableRows([{rows}] of {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.new_empty.default and args[0].shape == torch.Size(args[1]):
            # dcp.async_save copies a tensor: it makes an empty one and copies the attributes.
            device = (kwargs or {}).get("device") or args[0].device
            return tensor_without_storage(cls, args[0].shape, torch.empty(0, dtype=args[0].dtype, device=device))
        raise TypeError(
            f"TableRows is for torch.distributed.checkpoint's save and load alone, got {func}: pass the state dict "
            f"through torch_impl.local_state_dict first"
        )

    def _offsets(self) -> torch.Size:
        return torch.Size([self._start, *[0] * (self.dim() - 1)])

    def _chunk(self) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=self._offsets(), sizes=self._rows.shape)

    def __create_write_items__(self, fqn: str, object: Tensor) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not len(self._rows):
            return []
        data = TensorWriteData(self._chunk(), TensorProperties(dtype=self.dtype), self.shape)
        index = MetadataIndex(fqn, self._offsets())
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if len(self._rows) else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if index.offset != self._offsets():
            raise ValueError(f"index must be that of this rank's rows, offset {self._offsets()}, got {index.offset}")
        return self._rows
