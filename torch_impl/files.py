"""A layer's table in files: read a rank's rows, write all ranks' rows, and torch.distributed.checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.bits import DTYPES
from shared.config import EmbeddingConfig
from shared.partition import VocabPartition
from shared.tables.find_table import Paths, open_table
from shared.tables.table_file import TableFile
from shared.tables.table_writer import TableSpec, write_table
from torch_impl.agreement import gather_objects
from torch_impl.further_split import rows_here
from torch_impl.host_rows import fill_rows, memory_of
from torch_impl.process_group import find_group, resolve_rank
from torch_impl.zero_row import ModuleWithTable

__all__ = ["TableInFiles", "options_of"]


class TableInFiles(ModuleWithTable):
    """A module with a rank's rows of a table, which it reads from files and writes to them."""

    config: EmbeddingConfig
    rank: int
    table_rows: int
    """Rows that all ranks have together: ``padded_vocab_size``, or ``vocab_size`` where DTensor cuts the table unevenly."""
    _group_name: str | None

    def mark_state_dicts(self) -> None:
        """Have ``state_dict()`` say whose rows it holds, beside its keys, and ``load_state_dict`` refuse another rank's."""
        self.register_state_dict_post_hook(_say_whose_rows)
        self.register_load_state_dict_pre_hook(_refuse_other_rows)

    if TYPE_CHECKING:  # each option is a property, made beside the layer
        partition: VocabPartition
        vocab_size: int
        emb_size: int
        world_size: int
        padded_vocab_size: int

    def allocate(self, dtype: torch.dtype, device: Any) -> None:
        """Give the module an uninitialised ``weight``."""
        bounds = self.partition.start(self.rank), self.partition.stop(self.rank)
        start, stop = (min(bound, self.table_rows) for bound in bounds)
        self.allocate_table(stop - start, self.emb_size, dtype, device, self.table_rows)

    def own_rows(self, like_weight: Tensor | None = None) -> tuple[Tensor, int]:
        """The rows of this process, which share the memory, and the number of its first among the rank's.

        Args:
            like_weight: a tensor that is split as the table is, such as its gradient; left out, the table.
        """
        rows, first = rows_here(self.weight if like_weight is None else like_weight)
        if self.device_mesh is not None:
            first -= min(self.partition.start(self.rank), self.table_rows)
        return rows, first

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group that the layer was built with; None without one.

        Raises:
            RuntimeError: it does not exist in this process (any more), or it is not the one the layer was built for.
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
        """Build a rank's layer from a table in files, reading its rows and no others.

        Args:
            path: a safetensors file, a Hugging Face ``*.index.json``, a folder that holds one of these, or Megatron-style
                parts (see ``shared.tables.find_table.open_table``).
            tensor_name: the tensor; left out, the one that looks like an input embedding.
            rank, world_size, process_group: as for the class.
            vocab_size: the rows that are not padding, which only Megatron-style parts do not tell.
            dtype: what to cast the rows to, rounding once; left out, the dtype they are stored in, which must then be one
                that a layer can have (float8 is not).
            device: where the rows go.
            **options: what else the class takes by name: ``padded_vocab_size`` where ``world_size`` does not divide the
                vocabulary, ``reduction`` and so on.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: there is no such table, the choice is not clear, a file is damaged, or an argument is out of range.

        A damaged or hostile file is refused; nothing is ever unpickled. Source: the safetensors format.

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
                raise ValueError(f"dtype must say what to cast a table of {table.dtype} to, such as torch.bfloat16")
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
        """Build a rank's layer from a whole table in memory, copying its rows.

        Args:
            table: an ``nn.Embedding``, whose ``padding_idx`` and ``sparse`` are taken over, or a tensor ``[v, e]``. It is
                not modified; its gradient is not followed.
            rank, world_size, process_group: as for the class.
            dtype: what to cast the rows to; left out, the table's.
            device: where the rows go; left out, where the table is.
            **options: what else the class takes by name.

        Raises:
            TypeError: ``table`` is neither; an argument is of the wrong kind.
            ValueError: ``table`` is not of two dimensions or on the meta device; an ``nn.Embedding`` has ``max_norm`` or
                ``scale_grad_by_freq``, which this layer does not; an argument is out of range.

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
        """Write the table to one new safetensors file: each rank its own rows, without padding.

        All ranks call this. Rows are read back after writing. The file appears whole or not at all; an old one stays until
        then. The temporary file of a killed process, ``.NAME.*.tmp``, stays beside it.

        Args:
            path: the file, which ends in ``.safetensors``. All ranks must see its folder.
            tensor_name: what to call the tensor.
            process_group: the ranks, where the layer was built without a group.
            force: replace what is there.

        Raises:
            ValueError: on every rank: the path exists and ``force`` is not given, or it cannot be written; the table is on
                the meta device, or split further by ``fully_shard``; ranks and no group.

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
                "the table must not be split further, as by fully_shard, to be saved: save it by sharded_state_dict() and "
                "torch.distributed.checkpoint, or call unshard() on the module first"
            )
        if process_group is not None:
            resolve_rank(self.rank, self.world_size, process_group)
        elif (process_group := self.process_group) is None and self.world_size > 1:
            raise ValueError(
                f"process_group must be given: the layer has {self.world_size} ranks and no group of its own"
            )
        _write_table(self.own_rows()[0], self.partition, self.rank, process_group, path, tensor_name, force)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = None, metadata: Any = None
    ) -> dict[str, Tensor]:
        """Return ``weight`` as ``torch.distributed.checkpoint`` saves and loads it: as rows of the whole table.

        Loading writes to the parameter in place; where ``fully_shard`` has split it further, to this process's part. Any
        number of ranks with any padding load what others saved.
        (``state_dict()`` is the rank's own: that library would take the ranks' different rows for copies of one tensor.)
        ``torch_impl.sharded_state_dict`` does this for a whole model and for its optimizer.

        Args:
            prefix: what the name begins with.
            sharded_offsets, metadata: what Megatron-core passes to a method of this name; refused.

        Raises:
            TypeError: Megatron-core calls, which takes ``torch_impl.adapters.megatron.VocabParallelEmbedding``.
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
        from torch_impl.checkpoint import TableRows  # which builds on this module

        whole = self.device_mesh is not None and self.table_rows == self.vocab_size
        rows = self.weight.detach() if whole else TableRows(self.weight, self.partition, self.rank)
        return {f"{prefix}weight": rows}

    def _require_storage(self) -> None:
        if self.weight.is_meta:
            raise ValueError("the table must have storage to be saved or loaded: call to_empty(device=...) first")


def options_of(embedding: nn.Embedding) -> dict[str, Any]:
    """The options of a layer that does what the ``nn.Embedding`` does.

    Raises:
        ValueError: it has ``max_norm`` or ``scale_grad_by_freq``, which the layer has not.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise ValueError("table must be an nn.Embedding without max_norm and scale_grad_by_freq")
    return {"padding_idx": embedding.padding_idx, "sparse": embedding.sparse}


def _say_whose_rows(layer: TableInFiles, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata["rows"] = _rows_of(layer)


def _refuse_other_rows(
    layer: TableInFiles, state: Any, prefix: str, local_metadata: dict[str, Any], *others: Any
) -> None:
    from torch_impl.checkpoint import TableRows

    saved, own, given = local_metadata.get("rows"), _rows_of(layer), state.get(f"{prefix}weight")
    if isinstance(given, TableRows):  # what torch.distributed.checkpoint loaded
        saved, state[f"{prefix}weight"] = given.owned, given.rank_rows
    if saved is None or saved == own:  # files of other formats do not say
        return
    names = [f"rows [{start}, {stop}) of {vocab_size}" for start, stop, vocab_size in (saved, own)]
    others[-1].append(
        f"{prefix}weight must hold this rank's own {names[1]}, got {names[0]}: load the state dict of this rank, or all "
        f"ranks' by sharded_state_dict() and torch.distributed.checkpoint"
    )


def _rows_of(layer: TableInFiles) -> list[int]:
    return [*layer.partition.owned_range(layer.rank), layer.vocab_size]


def _fill_from_table(weight: Tensor, table: TableFile, partition: VocabPartition, rank: int) -> None:
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


def _write_table(
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
    rows, (start, stop) = weight.detach(), partition.owned_range(rank)

    def read(first: int, last: int) -> np.ndarray:
        # A copy: a storage that NumPy has seen cannot be resized any more, which fully_shard does.
        return memory_of(rows[first - start : last - start].to("cpu", copy=True).contiguous())

    def exchange(mine: Any) -> list[Any]:
        return [mine] if group is None else gather_objects(mine, group, "what each rank wrote of a table")

    spec = TableSpec(tensor_name, dtype, partition.vocab_size, weight.shape[1])
    process = 0 if group is None else rank
    write_table(path, spec, [(start, stop)], read, force=force, process=process, exchange=exchange)
