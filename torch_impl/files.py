"""Tables in files: read a rank's rows, write all ranks' rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.types import Device

from shared.bits import DTYPES
from shared.config import EmbeddingConfig
from shared.partition import VocabPartition
from shared.tables.find_table import Paths, open_table
from shared.tables.table_file import TableFile, TableSpec
from shared.tables.table_writer import write_table
from torch_impl.agreement import gather_objects
from torch_impl.further_split import rows_here
from torch_impl.host_rows import fill_rows, memory_of
from torch_impl.process_group import find_group, resolve_rank
from torch_impl.table_rows import TableRows
from torch_impl.zero_row import ModuleWithTable

__all__ = ["TableInFiles", "options_of"]


class TableInFiles(ModuleWithTable):
    """Module that reads and writes its rows of a table."""

    config: EmbeddingConfig
    rank: int
    table_rows: int
    """Rows of all ranks: ``padded_vocab_size``, or ``vocab_size`` where DTensor splits the table unevenly."""
    _group_name: str | None

    def mark_state_dicts(self) -> None:
        """Record the rank's range in ``state_dict()``'s metadata; refuse other ranks' rows."""
        self.register_state_dict_post_hook(_record_range)
        self.register_load_state_dict_pre_hook(_check_range)

    if TYPE_CHECKING:  # vocab_emb.py makes a property of each option
        partition: VocabPartition
        vocab_size: int
        emb_size: int
        world_size: int
        padded_vocab_size: int

    def allocate(self, dtype: torch.dtype, device: Device) -> None:
        """Allocate an uninitialised ``weight``."""
        bounds = self.partition.start(self.rank), self.partition.stop(self.rank)
        start, stop = (min(bound, self.table_rows) for bound in bounds)
        self.allocate_table(stop - start, self.emb_size, dtype, device, self.table_rows)

    def own_rows(self, like_weight: Tensor | None = None) -> tuple[Tensor, int]:
        """This process's rows, sharing memory, and their start within the rank's.

        Args:
            like_weight: a tensor split as the table is, such as its gradient; default: the table.
        """
        rows, first = rows_here(self.weight if like_weight is None else like_weight)
        if self.device_mesh is not None:
            first -= min(self.partition.start(self.rank), self.table_rows)
        return rows, first

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Process group that the layer was built with; None without one.

        Raises:
            RuntimeError: this process does not have that group, or it differs from the layer's.
        """
        return None if self._group_name is None else find_group(self._group_name, self.rank, self.world_size)

    @classmethod
    def from_table(
        cls,
        path: Paths,
        tensor_name: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Build a layer and read its rows of a table in files.

        Args:
            path: a safetensors file, a Hugging Face ``*.index.json``, a folder that holds one of these, or
                Megatron-style parts (``shared.tables.find_table.open_table``).
            tensor_name: the tensor. Default: the one named like an input embedding, or the only table.
            rank, world_size, process_group: as for the class.
            vocab_size: rows that are not padding; only Megatron-style parts need it.
            dtype: dtype of the layer; rows are rounded once. Default: the stored dtype, which must be one that a layer
                can have (float8 is not).
            device: where the table lives.
            **options: the class's keyword arguments, such as ``padded_vocab_size`` or ``reduction``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: there is no such table, the choice is ambiguous, a file is damaged, or an argument is out of range.

        Nothing is unpickled. Source: the safetensors format.

        Example:
            >>> import tempfile, torch
            >>> from safetensors.torch import save_file
            >>> from torch_impl import ParallelVocabEmbedding
            >>> folder = tempfile.mkdtemp()
            >>> table = torch.randn(10, 4).bfloat16()
            >>> save_file({"model.embed_tokens.weight": table}, f"{folder}/model.safetensors")
            >>> emb = ParallelVocabEmbedding.from_table(folder, rank=2, world_size=4, padded_vocab_size="even")
            >>> torch.equal(emb.weight[:3], table[6:9])
            True
        """
        table = open_table(path, tensor_name, vocab_size)
        if dtype is None:
            if table.dtype not in DTYPES:
                raise ValueError(f"dtype must say what to cast a table of {table.dtype} to: pass torch.bfloat16, say")
            dtype = getattr(torch, table.dtype)
        sizes = table.vocab_size, table.emb_size, rank, world_size, process_group
        self = cls(*sizes, dtype=dtype, device="meta", **options)
        self.allocate(dtype, device)
        if not self.weight.is_meta:
            _fill_from_table(self.own_rows()[0], table, self.partition, self.rank)
        return self

    @classmethod
    def from_embedding(
        cls,
        table: nn.Embedding | Tensor,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Build a rank's layer from a whole table in memory.

        Args:
            table: an ``nn.Embedding``, whose ``padding_idx`` and ``sparse`` are adopted, or a tensor ``[v, e]``. The
                rank's rows are copied, without gradient tracking.
            rank, world_size, process_group: as for the class.
            dtype: dtype of the layer. Default: the table's.
            device: where the layer's table lives. Default: the table's device.
            **options: the class's keyword arguments.

        Raises:
            TypeError: ``table`` is neither; an argument has the wrong type.
            ValueError: ``table`` does not have two dimensions or is on the meta device; the ``nn.Embedding`` has
                ``max_norm`` or ``scale_grad_by_freq``, which this layer lacks; an argument is out of range.

        Example:
            >>> import torch
            >>> from torch_impl import ParallelVocabEmbedding
            >>> whole = torch.nn.Embedding(10, 4)
            >>> emb = ParallelVocabEmbedding.from_embedding(whole, rank=1, world_size=2)
            >>> torch.equal(emb.weight, whole.weight[5:])
            True
        """
        if isinstance(table, nn.Embedding):
            options = {**options_of(table), **options}
            table = table.weight
        if not isinstance(table, Tensor):
            raise TypeError(f"table must be an nn.Embedding or a tensor, got {type(table).__name__}")
        if table.dim() != 2 or table.is_meta:
            raise ValueError(f"table must be [v, e] and have storage, got {list(table.shape)} on {table.device}")
        if hasattr(table, "placements"):
            raise ValueError("table must be a plain tensor, got a DTensor: pass full_tensor() of it")
        dtype, device = dtype or table.dtype, device or table.device
        sizes = *table.shape, rank, world_size, process_group
        self = cls(*sizes, dtype=dtype, device="meta", **options)
        self.allocate(dtype, device)
        start, stop = self.partition.owned_range(self.rank)
        rows, _ = self.own_rows()
        rows[: stop - start].copy_(table[start:stop].detach())
        rows[stop - start :].zero_()
        return self

    def save_table(
        self,
        path: str | Path,
        tensor_name: str = "embed_tokens.weight",
        *,
        process_group: dist.ProcessGroup | None = None,
        force: bool = False,
    ) -> None:
        """Write the table, without padding, to one new safetensors file.

        All ranks call this; each writes its own rows and reads them back. The file appears whole or not at all; an old
        one stays until then. A killed process leaves its temporary file ``.NAME.*.tmp``.

        Args:
            path: the file, which ends in ``.safetensors``, in a folder that all ranks see.
            tensor_name: name of the tensor.
            process_group: the ranks, if the layer was built without a group.
            force: replace an existing file.

        Raises:
            ValueError: on every rank: the path exists and ``force`` is False, or cannot be written; the table is on the
                meta device, or split further by ``fully_shard``; there are several ranks and no group.

        Example:
            >>> import tempfile, torch
            >>> from torch_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(10, 4)
            >>> path = f"{tempfile.mkdtemp()}/table.safetensors"
            >>> emb.save_table(path)
            >>> torch.equal(ParallelVocabEmbedding.from_table(path).weight, emb.weight)
            True
        """
        self._require_storage()
        if len(getattr(self.weight, "placements", ())) > (self.device_mesh is not None):
            raise ValueError(
                "the table must not be split further, as by fully_shard, to be saved: call sharded_state_dict() and "
                "torch.distributed.checkpoint's save, or call unshard() on the module first"
            )
        if process_group is not None:
            resolve_rank(self.rank, self.world_size, process_group)
        elif (process_group := self.process_group) is None and self.world_size > 1:
            raise ValueError(
                f"process_group must be given: the layer has {self.world_size} ranks and was built without a group"
            )
        _write_table(self.own_rows()[0], self.partition, self.rank, process_group, path, tensor_name, force)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: object = None, metadata: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Return ``weight`` as rows of the whole table, for ``torch.distributed.checkpoint``.

        Loading overwrites the parameter in place, or this process's part of it after ``fully_shard``. Any number of
        ranks with any padding can load it. Do not save ``state_dict()``: that library takes the ranks' rows for copies
        of one tensor. ``torch_impl.sharded_state_dict`` converts a whole model and its optimizer.

        Args:
            prefix: prefix of the name.
            sharded_offsets, metadata: Megatron-core's arguments; refused.

        Raises:
            TypeError: the caller is Megatron-core, which needs ``torch_impl.adapters.megatron.VocabParallelEmbedding``.
            ValueError: the table is on the meta device.

        Example:
            >>> import tempfile, torch.distributed.checkpoint as dcp
            >>> from torch_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(10, 4)
            >>> folder = tempfile.mkdtemp()
            >>> _ = dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=folder)
            >>> other = ParallelVocabEmbedding(10, 4, init_base_seed=0)
            >>> dcp.load(other.sharded_state_dict("emb."), checkpoint_id=folder)
            >>> bool((other.weight == emb.weight).all())
            True
        """
        if sharded_offsets is not None or metadata is not None:
            raise TypeError(
                "sharded_offsets and metadata must be left out: they are Megatron-core's, whose checkpoints "
                "torch_impl.adapters.megatron.VocabParallelEmbedding writes and reads; build the model with it"
            )
        self._require_storage()
        whole = self.device_mesh is not None and self.table_rows == self.vocab_size
        rows = self.weight.detach() if whole else TableRows(self.weight, self.partition, self.rank)
        return {f"{prefix}weight": rows}

    def _require_storage(self) -> None:
        if self.weight.is_meta:
            raise ValueError("the table must have storage to be saved or loaded: call to_empty(device=...) first")


def options_of(embedding: nn.Embedding) -> dict[str, Any]:
    """Options of a layer that computes what the ``nn.Embedding`` does.

    Raises:
        ValueError: ``max_norm`` or ``scale_grad_by_freq`` is set, which the layer lacks.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise ValueError(
            f"table must be an nn.Embedding without max_norm and scale_grad_by_freq, got max_norm={embedding.max_norm} and "
            f"scale_grad_by_freq={embedding.scale_grad_by_freq}; build it without them"
        )
    return {"padding_idx": embedding.padding_idx, "sparse": embedding.sparse}


def _record_range(layer: TableInFiles, state: object, prefix: str, local_metadata: dict[str, object]) -> None:
    local_metadata["rows"] = _rows_of(layer)


def _check_range(
    layer: TableInFiles, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
) -> None:
    saved, own, given = local_metadata.get("rows"), _rows_of(layer), state.get(f"{prefix}weight")
    if isinstance(given, TableRows):  # loaded by torch.distributed.checkpoint
        saved, state[f"{prefix}weight"] = given.owned, given.rank_rows
    if saved is None or saved == own:  # other formats record no range
        return
    names = [f"rows [{start}, {stop}) of {vocab_size}" for start, stop, vocab_size in (saved, own)]
    others[-1].append(
        f"{prefix}weight must hold this rank's own {names[1]}, got {names[0]}: load this rank's state dict, or use "
        f"sharded_state_dict() and torch.distributed.checkpoint"
    )


def _rows_of(layer: TableInFiles) -> list[int]:
    return [*layer.partition.owned_range(layer.rank), layer.vocab_size]


def _fill_from_table(weight: Tensor, table: TableFile, partition: VocabPartition, rank: int) -> None:
    """Read and cast a rank's rows in place; padding becomes zero.

    A CPU tensor's memory is filled from the file, another device's 16 MiB at a time.
    """
    start, stop = partition.owned_range(rank)
    rows = weight.detach()
    rows[stop - start :].zero_()
    fill_rows(rows[: stop - start], lambda first, memory: table.read_rows(start + first, memory))


def _write_table(
    weight: Tensor,
    partition: VocabPartition,
    rank: int,
    group: dist.ProcessGroup | None,
    path: str | Path,
    tensor_name: str,
    force: bool,
) -> None:
    """Write the ranks' rows ``[n, e]`` as one table, as ``save_table`` describes.

    Every rank of ``group`` calls this with equal arguments; None is a single rank. If one fails, all raise ValueError.
    """
    dtype = str(weight.dtype).removeprefix("torch.")
    rows, (start, stop) = weight.detach(), partition.owned_range(rank)

    def read(first: int, last: int) -> np.ndarray:
        # A copy: fully_shard resizes storages, which is impossible once NumPy has seen them.
        return memory_of(rows[first - start : last - start].to("cpu", copy=True).contiguous())

    def exchange(mine: Any) -> list[Any]:
        return [mine] if group is None else gather_objects(mine, group, "what each rank wrote of a table")

    spec = TableSpec(tensor_name, dtype, partition.vocab_size, weight.shape[1])
    process = 0 if group is None else rank
    write_table(path, spec, [(start, stop)], read, force=force, process=process, exchange=exchange)
