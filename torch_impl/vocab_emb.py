"""The PyTorch layer: one rank's part of a vocabulary-parallel embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.agreement import checks_wanted
from shared.bits import DTYPES
from shared.checks import (
    EXCHANGES,
    INITS,
    REDUCTIONS,
    as_int,
    check_choice,
    check_normal,
    check_padding_idx,
    check_seed,
    check_size,
    table_dtype_error,
)
from shared.find_table import Paths, open_table
from shared.partition import VocabPartition
from torch_impl.faults import check_agreement
from torch_impl.functional import lookup_checked
from torch_impl.ids import as_ids, check_ids
from torch_impl.initial import fill_normal
from torch_impl.local.accumulation import into_place
from torch_impl.local.frame import empty_table
from torch_impl.placement import find_group, resolve_group, resolve_rank
from torch_impl.reductions import ReductionOptions, reduce_lookup
from torch_impl.rows import differentiable, take_few
from torch_impl.table import fill_from_table, write_table

__all__ = ["ParallelVocabEmbedding"]


class ParallelVocabEmbedding(nn.Module):
    """Rank ``rank``'s rows of an embedding table whose vocabulary is split over ``world_size`` ranks.

    The module keeps rows ``[rank * n, (rank + 1) * n)``, ``n = vocab_size // world_size`` (``padded_vocab_size`` in the
    place of ``vocab_size`` where there is padding), looks up the ids it owns and returns all-zero rows for the others. No
    two ranks' results have a row in common: their sum is the full embedding, which ``reduction`` makes of them.

    Args:
        vocab_size: rows of the whole table, all ranks together; must be divisible by ``world_size``, unless it is padded.
        emb_size: columns of the table.
        rank: this rank, in ``[0, world_size)``. Left out: the group's, or 0 without a group.
        world_size: number of ranks. Left out: the group's, or 1 without a group.
        process_group: where ``rank`` and ``world_size`` come from; where they are given too, they must agree with it.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws its rows from a generator of its own, seeded ``init_base_seed + r``.
        dtype: float16, bfloat16, float32 or float64.
        device: where the table lives; ``"meta"`` builds it without storage (then ``to_empty`` and ``reset_parameters``).
        reduction: ``"none"``, each rank returns its own incomplete embedding ``Er``, without communication;
            ``"all_reduce"``, every rank returns the embedding ``E``; ``"reduce_scatter"``, each rank returns its
            ``1 / world_size`` of ``E`` along the sequence. The last two need ``process_group`` where there are several
            ranks, and all ranks must be given the same ids.
        exchange: how rows travel: ``"dense"``, by the collective that adds incomplete embeddings up; ``"routed"``, each
            distinct row straight from its owner to who needs it; ``"auto"``, whichever is faster by measured rules
            (``torch_impl.reductions.choose_exchange``). Values and gradients are the same, to the last bit on a CPU.
        invalid_ids: what ids outside ``[0, vocab_size)``, negative ones included, give: ``"zero"``, a zero row on every
            rank; ``"error"``, an IndexError on every rank.
        padding_idx: a global id whose row is set to zero by ``reset_parameters`` and gets no gradient.
        padded_vocab_size: rows with those of padding, which ``world_size`` divides, or ``"even"`` for the least such size
            (``shared.pad_vocab_size`` finds others). Padding comes last: zero, no id's, without a gradient, never written
            to a file. Left out, there is none.
        sparse: make ``weight.grad`` a sparse COO tensor of the distinct rows asked for (not under torch.compile).
        init: ``"per_rank"``, as described above; ``"global"``, row i of the table is a function of ``init_base_seed`` and
            i alone, the same bits in both frameworks, for any number of ranks and any padding; computed on the host.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits: the last one; 0 for ids of ``[s, b]``.
        check: compare, in every forward, what all ranks of the group are about to compute, and raise on every rank if
            they disagree; the environment variable ``PVE_CHECK=1`` does the same. Costs an exchange of a few hundred
            bytes, and on an accelerator the host waits for the device.
        gradient_accumulation_fusion: have backward add the rows' gradients straight to ``weight.main_grad`` where there is
            such a tensor, to ``weight.grad`` else, and hand autograd nothing: a micro-batch then takes as long as its
            tokens, not as the table. The result is the plain one, of ``main_grad.add_(grad)``; ``main_grad`` has the table's
            shape and device, and its dtype, float32 or a wider one. Under ``fully_shard`` too; refused under
            DistributedDataParallel, torch.func and with hooks on the table; torch.compile breaks the graph. Gradients are
            not to be had from ``torch.autograd.grad``. On an accelerator the host waits for the device.

    Attributes:
        weight: parameter of shape ``[n, emb_size]``: the only entry of ``state_dict()``.
        partition: the ``shared.VocabPartition``, who owns what.
        rank: this rank.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; ``vocab_size`` is not divisible by ``world_size`` and not padded; ``rank``
            or ``world_size`` disagrees with ``process_group``; a reduction needs a group and there is none.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import torch
        >>> from torch_impl import ParallelVocabEmbedding
        >>> ids = torch.tensor([[0, 5], [11, 3]])
        >>> ranks = [ParallelVocabEmbedding(12, 4, rank=r, world_size=3) for r in range(3)]
        >>> partials = [emb(ids) for emb in ranks]
        >>> table = torch.cat([emb.weight for emb in ranks])
        >>> torch.equal(sum(partials), torch.nn.functional.embedding(ids, table))
        True
    """

    weight: nn.Parameter

    def __init__(
        self,
        vocab_size: int,
        emb_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        reduction: str = "none",
        exchange: str = "auto",
        invalid_ids: str = "zero",
        padding_idx: int | None = None,
        padded_vocab_size: int | str | None = None,
        sparse: bool = False,
        init: str = "per_rank",
        seq_dim: int = -1,
        check: bool = False,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__()
        self.rank, world_size = resolve_rank(rank, world_size, process_group)
        self.partition = VocabPartition(vocab_size, world_size, padded_vocab_size)
        self.emb_size = check_size("emb_size", emb_size)
        self.init_mean, self.init_std = check_normal(init_mean, init_std)
        self.init_base_seed = check_seed(init_base_seed, world_size)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise table_dtype_error(dtype)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.exchange = check_choice("exchange", exchange, EXCHANGES)
        self.invalid_ids = check_choice("invalid_ids", invalid_ids, ("zero", "error"))
        self.padding_idx = check_padding_idx(padding_idx, self.partition.vocab_size)
        self.sparse = bool(sparse)
        self.gradient_accumulation_fusion = bool(gradient_accumulation_fusion)
        if self.sparse and self.gradient_accumulation_fusion:
            raise ValueError("gradient_accumulation_fusion must be False with sparse=True, whose gradient is no buffer")
        self.init = check_choice("init", init, INITS)
        self.seq_dim = as_int("seq_dim", seq_dim)
        self._group_name = resolve_group(process_group, self.reduction, world_size)
        self.check = checks_wanted(check)
        if check and world_size > 1 and process_group is None:
            raise ValueError("check=True compares the ranks of a process_group: pass it")
        # Compiled graphs take the rank as data, so that they are the same on every rank.
        self._rank_tensor = torch.tensor(self.rank, device="cpu")
        self.weight = nn.Parameter(empty_table(self.partition.rows_per_rank, self.emb_size, dtype, device))
        self.reset_parameters()

    @property
    def vocab_size(self) -> int:
        """Rows of the whole table, all ranks together."""
        return self.partition.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """The same with the rows of padding."""
        return self.partition.padded_vocab_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.partition.world_size

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
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Self:
        """A rank's layer with its rows of a table in files, of which it reads those rows and no others.

        Args:
            path: a safetensors file, an ``....index.json`` over several, a set of shards written for any number of ranks,
                a folder that holds one of these, or Megatron-style parts (``shared.find_table.open_table`` has it all).
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
        self = cls(
            table.vocab_size,
            table.emb_size,
            rank,
            world_size,
            process_group,
            dtype=dtype,
            device="meta",
            **options,
        )
        self.weight = nn.Parameter(empty_table(self.partition.rows_per_rank, self.emb_size, dtype, device))
        if not self.weight.is_meta:
            fill_from_table(self.weight, table, self.partition, self.rank)
        return self

    def save_table(
        self,
        path: str | Path,
        tensor_name: str = "embed_tokens.weight",
        *,
        process_group: dist.ProcessGroup | None = None,
        force: bool = False,
    ) -> None:
        """Write the table to files; every rank writes its own rows, and none writes padding.

        All ranks call this. What was written is read back. The new table is there whole or not at all; the old one stays
        until it is.

        Args:
            path: a file, if it ends in ``.safetensors``; else a folder, for a file a rank and a manifest. All ranks must
                see it.
            tensor_name: what to call the tensor.
            process_group: the ranks, where the layer was built without a group.
            force: replace what is there.

        Raises:
            ValueError: on every rank: the path exists and ``force`` is not given, or it cannot be written; the table is on
                the meta device; ranks and no group.

        Example:
            >>> import tempfile, torch
            >>> from torch_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(10, 4)
            >>> path = f"{tempfile.mkdtemp()}/table.safetensors"
            >>> emb.save_table(path)
            >>> torch.equal(ParallelVocabEmbedding.from_table(path).weight, emb.weight)
            True
        """
        if self.weight.is_meta:
            raise ValueError("the table must have storage to be saved: call to_empty(device=...) first")
        if process_group is not None:
            resolve_rank(self.rank, self.world_size, process_group)
        elif self._group_name is not None:
            process_group = find_group(self._group_name, self.rank, self.world_size)
        elif self.world_size > 1:
            raise ValueError(
                f"process_group must be given: the layer has {self.world_size} ranks and no group of its own"
            )
        write_table(self.weight, self.partition, self.rank, process_group, path, tensor_name, force)

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """What ``torch.distributed.checkpoint`` saves and loads, in place: ``weight`` as the rank's rows of one whole table.

        Any number of ranks with any padding load what others saved. (``state_dict()`` is the rank's own: given to that
        library, it would take the ranks' different rows for copies of one tensor.)

        Args:
            prefix: what the name begins with.

        Raises:
            ValueError: the table is on the meta device.

        Example:
            >>> import tempfile, torch.distributed.checkpoint as dcp
            >>> from torch_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(10, 4)
            >>> folder = tempfile.mkdtemp()
            >>> _ = dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=folder, no_dist=True)
            >>> other = ParallelVocabEmbedding(10, 4, init_base_seed=0)
            >>> dcp.load(other.sharded_state_dict("emb."), checkpoint_id=folder, no_dist=True)
            >>> bool((other.weight == emb.weight).all())
            True
        """
        if self.weight.is_meta:
            raise ValueError("the table must have storage to be saved or loaded: call to_empty(device=...) first")
        from torch_impl.checkpoint import TableRows  # half a second, for those who need it

        return {f"{prefix}weight": TableRows(self.weight, self.partition, self.rank)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rank's rows again; padding and the row of ``padding_idx``, where this rank owns it, become zero.

        With ``init="per_rank"`` the numbers are those of ``torch.manual_seed(init_base_seed + rank)`` followed by
        ``nn.init.normal_``, in the table's dtype on its device. The caller's random state is left as it was. A table on
        the meta device stays so.
        """
        if self.weight.is_meta:
            return
        fill_normal(
            self.weight, self.partition, self.rank, self.init, self.init_mean, self.init_std, self.init_base_seed
        )
        if self.padding_idx is not None and self.partition.owns(self.padding_idx, self.rank):
            self.weight[self.partition.local_ids(self.padding_idx, self.rank)].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids up.

        Args:
            ids: global ids, any shape, any integer dtype; not modified. With a reduction, the same on all ranks.

        Returns:
            On the ids' device, in the table's dtype: with ``reduction="none"`` the incomplete embedding ``Er``,
            ``[*ids.shape, emb_size]``, +0.0 for ids that this rank does not own; with ``"all_reduce"`` the embedding,
            of the same shape; with ``"reduce_scatter"`` this rank's chunk of it, where the ids' dimension ``seq_dim`` is
            divided by ``world_size``. Rows are copied bit for bit.

        The gradient of ``"all_reduce"`` is local: every rank must come to the same gradient of ``E``, as it does where
        all ranks compute the same loss of it.

        Raises:
            TypeError: ids are not a tensor of integers.
            IndexError: with ``invalid_ids="error"``, naming the first id outside the vocabulary, its position and the
                legal range.
            ValueError: with ``"reduce_scatter"``, the sequence is not divisible by ``world_size``; with ``check``, the
                ranks disagree.
            RuntimeError: a collective failed, because a rank has ended, say; the message names the operation.
        """
        weight: Tensor = self.weight
        if self.reduction == "none" and self.invalid_ids == "zero" and not (self.check or differentiable(weight)):
            found = take_few(weight, ids, self.partition, self.rank)
            if found is not None:
                return found
        if self.check and self._group_name is not None:
            ids = self._agreed(ids)
        rank = self._rank_tensor if torch.compiler.is_compiling() else self.rank
        sparse = self.sparse
        if self.gradient_accumulation_fusion and weight.requires_grad and torch.is_grad_enabled():
            weight, sparse = into_place(weight), True
        if self.reduction == "none":
            return lookup_checked(weight, ids, self.partition, rank, self.invalid_ids, self.padding_idx, sparse)
        ids = check_ids(ids, self.vocab_size) if self.invalid_ids == "error" else as_ids(ids)
        options = ReductionOptions(
            self.reduction,
            self.exchange,
            self.seq_dim,
            self.padding_idx,
            sparse,
            self._group_name,
            None if torch.compiler.is_compiling() else self.rank,
        )
        return reduce_lookup(weight, ids, self.partition, options)

    def _agreed(self, ids: Tensor) -> Tensor:
        """The ids, once all ranks are known to look the same ones up in the same way."""
        assert self._group_name is not None
        sizes = ("vocab_size", "padded_vocab_size", "emb_size")
        names = (*sizes, "reduction", "exchange", "seq_dim", "invalid_ids", "padding_idx", "sparse")
        facts = [f"dtype={self.weight.dtype}", *[f"{name}={getattr(self, name)}" for name in names]]
        if torch.compiler.is_compiling():
            return torch.ops.pve.check_agreement(ids, "\n".join(facts), self._group_name, self.world_size)
        check_agreement(ids, facts, find_group(self._group_name, self.rank, self.world_size))
        return ids

    def extra_repr(self) -> str:
        text = f"{self.vocab_size}, {self.emb_size}, rank={self.rank}, world_size={self.world_size}"
        defaults: dict[str, Any] = {
            "reduction": "none",
            "exchange": "auto",
            "invalid_ids": "zero",
            "padding_idx": None,
            "padded_vocab_size": self.vocab_size,
            "sparse": False,
            "init": "per_rank",
            "seq_dim": -1,
            "check": False,
            "gradient_accumulation_fusion": False,
        }
        changed = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        return ", ".join([text, *(f"{name}={value!r}" for name, value in changed.items())])
