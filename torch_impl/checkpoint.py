"""A rank's rows as torch.distributed.checkpoint stores and loads them: as rows of one whole, unpadded table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared.partition import VocabPartition
from torch_impl.files import TableInFiles
from torch_impl.further_split import rows_here
from torch_impl.private_api import tensor_without_storage

if TYPE_CHECKING:  # half a second to import, for those who need it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["TableRows", "local_state_dict", "sharded_state_dict"]


def sharded_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict that ``torch.distributed.checkpoint`` can save and load.

    In it the tables of the model's layers, and what an optimizer holds for each of their rows, are rows of whole tables.
    Any number of ranks with any padding load what others saved. Loading writes to the memory of the given tensors.
    A state dict that is given to ``dcp.save`` as it is loses rows without an error: ``dcp`` keeps one rank's.

    Args:
        model: holds the layers; ``fully_shard`` may have split them further.
        state_dict: of the model, from ``get_model_state_dict`` or ``model.state_dict()``, or of an optimizer, from
            ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint.state_dict``. It is not modified.

    Returns:
        A copy of its dictionaries, with the same keys. After ``dcp.load`` pass it through ``local_state_dict`` to
        ``load_state_dict``, ``set_model_state_dict`` or ``set_optimizer_state_dict``.

    Raises:
        ValueError: the state dict has no table of the model, or names parameters by numbers; an optimizer holds something
            for a table that is neither one number nor one entry a row; a table is on the meta device.

    Example:
        >>> import tempfile, torch, torch.distributed.checkpoint as dcp
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
        >>> from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
        >>> model = torch.nn.Sequential(ParallelVocabEmbedding(10, 4, padded_vocab_size=12))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.tensor([3])).sum().backward()
        >>> optimizer.step()
        >>> state = sharded_state_dict(model, get_optimizer_state_dict(model, optimizer))
        >>> state["state"]["0.weight"]["exp_avg"]
        TableRows([0:10] of (10, 4), torch.float32, cpu)
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
        >>> dcp.load({"optimizer": state}, checkpoint_id=folder, no_dist=True)
        >>> set_optimizer_state_dict(model, optimizer, local_state_dict(state))
    """
    tables = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, TableInFiles)}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = inner.named_parameters(remove_duplicate=False)  # a tied head is another name of the table
    layers = {_without_wrappers(name): tables[id(each)] for name, each in parameters if id(each) in tables}
    of_optimizer = any(str(key).partition(".")[0] in ("state", "param_groups") for key in state_dict)
    found = False

    def walk(value: Any, path: str) -> Any:
        nonlocal found
        if isinstance(value, Mapping):
            return {key: walk(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        for name, layer in layers.items():
            if isinstance(value, Tensor) and (path == name or path.startswith(f"state.{name}.")):
                found = True
                return _rows_of_tables(value, layer, path)
        return value

    prefix = "module." if inner is not model else ""  # which DistributedDataParallel's own state_dict() has
    keys = [_without_wrappers(key.removeprefix(prefix)) for key in state_dict]
    result = walk(dict(zip(keys, state_dict.values(), strict=True)), "")
    if of_optimizer and any(isinstance(key, int) for key in state_dict.get("state", ())):
        raise ValueError(
            "state_dict must name parameters as the model does, got numbers: take it from get_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict"
        )
    if not found and not of_optimizer:
        raise ValueError(
            f"state_dict must be of the model or of its optimizer, and hold {' or '.join(layers) or 'a table'}, "
            f"got {sorted(map(str, state_dict))[:8]}"
        )
    return dict(zip(state_dict, result.values(), strict=True))


def local_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with this rank's own rows again, as modules and optimizers load them.

    Args:
        state_dict: from ``sharded_state_dict``, filled by ``torch.distributed.checkpoint.load`` or not. It is not modified.

    Example:
        >>> import torch
        >>> from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
        >>> emb = ParallelVocabEmbedding(10, 4, rank=1, world_size=2)
        >>> state = sharded_state_dict(emb, emb.state_dict())
        >>> state["weight"].shape, local_state_dict(state)["weight"].shape
        (torch.Size([10, 4]), torch.Size([5, 4]))
    """

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        return value.rank_rows if isinstance(value, TableRows) else value

    return walk(state_dict)


def _rows_of_tables(value: Tensor, layer: TableInFiles, path: str) -> Tensor:
    if value.is_meta:
        raise ValueError(f"{path} must have storage to be saved or loaded: call to_empty(device=...) first")
    if layer.device_mesh is not None and layer.table_rows == layer.vocab_size:  # a DTensor, which needs no more
        return value
    if value.dim() and value.shape[0] == layer.weight.shape[0]:
        return TableRows(value, layer.partition, layer.rank)
    if value.numel() == 1:  # a count of steps
        return value
    raise ValueError(
        f"{path} must be one number or have one entry for each of the rank's {layer.weight.shape[0]} rows, got "
        f"{list(value.shape)}: it says nothing to other ranks; use an optimizer that treats rows alike, such as Adam"
    )


def _without_wrappers(name: str) -> str:
    """A parameter's name as torch.distributed.checkpoint.state_dict gives it."""
    return re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module)\.", "", name)


class TableRows(Tensor):
    """A rank's rows of a table ``[vocab_size, ...]``, for torch.distributed.checkpoint; not for computing.

    It has the shape of the whole table, so that any number of ranks with any padding can load what others saved, and the
    storage of one rank's rows, which loading writes to. It follows the protocol by which DTensor tells that library what
    it has; a DTensor itself could only be split as DTensor splits, ``ceil(vocab_size / world_size)`` rows a rank.

    Args:
        rows: the rank's rows, ``[n, ...]``, those of padding included; shared, not copied. Those that ``fully_shard`` has
            split further are this process's part.
        partition: who owns what.
        rank: whose rows these are.
    """

    rank_rows: Tensor
    """The rank's rows as they were given."""
    owned: list[int]
    """The first id that the rank owns, the one after its last, and ``vocab_size``."""
    _rows: Tensor
    _start: int

    @staticmethod
    def __new__(cls, rows: Tensor, partition: VocabPartition, rank: int) -> TableRows:
        size = torch.Size([partition.vocab_size, *rows.shape[1:]])
        self: TableRows = tensor_without_storage(cls, size, rows_here(rows)[0])
        return self

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
            # dcp.async_save copies a tensor by making an empty one and copying its attributes.
            device = (kwargs or {}).get("device") or args[0].device
            return tensor_without_storage(cls, args[0].shape, torch.empty(0, dtype=args[0].dtype, device=device))
        raise TypeError(
            f"TableRows is for torch.distributed.checkpoint's save and load alone, not for {func}: pass the state dict "
            f"through torch_impl.local_state_dict first"
        )

    def _offsets(self) -> torch.Size:
        return torch.Size([self._start, *[0] * (self.dim() - 1)])

    def _chunk(self) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(offsets=self._offsets(), sizes=self._rows.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
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
            raise ValueError(f"this rank has rows from {self._start} on, not from {index.offset}")
        return self._rows
