"""The PyTorch layer: one rank's part of a vocabulary-parallel embedding."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.agreement import checks_wanted
from shared.checks import table_dtype_error
from shared.config import OPTIONS, EmbeddingConfig
from torch_impl.accumulation import accumulate_in_place
from torch_impl.agreement import agreed_ids
from torch_impl.data_parallel import active_data_parallel_problem, check_further_split
from torch_impl.exchange import reduced_lookup
from torch_impl.files import TableInFiles
from torch_impl.ids import checked_ids
from torch_impl.init import fill_table
from torch_impl.lookup import check_rows, lookup
from torch_impl.mesh import local_rows, resolve_mesh
from torch_impl.private_api import being_traced
from torch_impl.process_group import resolve_group, resolve_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ParallelVocabEmbedding"]


class ParallelVocabEmbedding(TableInFiles):
    """Rows ``[rank * n, (rank + 1) * n)`` of an embedding table that is split over ``world_size`` ranks.

    ``n = padded_vocab_size // world_size``. The module looks up the ids it owns and returns all-zero rows for the others. No
    two ranks' results have a row in common: they sum to the full embedding, which ``reduction`` makes of them.

    Args:
        vocab_size: rows of the whole table, all ranks together; divisible by ``world_size`` unless it is padded.
        emb_size: columns of the table.
        rank: this rank, in ``[0, world_size)``. Left out: the group's, or 0 if there is one rank only.
        world_size: number of ranks. Left out: the group's, or 1 without a group.
        process_group: where ``rank`` and ``world_size`` come from; numbers given beside it must agree with it.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws from a generator of its own, seeded ``init_base_seed + r``. Two layers with the same
            seed begin alike, and seed 42 on rank 1 is seed 43 on rank 0: give each layer a seed of its own, further apart
            than there are ranks.
        dtype: float16, bfloat16, float32 or float64. Left out: PyTorch's default dtype.
        device: where the table lives. Left out: PyTorch's default device. ``"meta"`` builds it without storage (then
            ``to_empty`` and ``reset_parameters``).
        device_mesh: a one-dimensional ``DeviceMesh``, or one dimension of a larger one, ``mesh["tp"]``, in the place of
            ``process_group``. ``weight`` is then a DTensor, ``Shard(0)`` over it, of all ranks' rows, so that
            ``torch.nn.utils.clip_grad_norm_``, ``torch.distributed.checkpoint``, optimizers' states and ``fully_shard``
            over another dimension of the mesh know what they hold. Lookups are those of the plain layer, on the rank's own
            rows; in backward DTensor adds 0.2 ms of its own. ``vocab_size`` need not be divisible: the last ranks have
            fewer rows, or none, as DTensor cuts a table.
        reduction: ``"none"``, each rank returns its own incomplete embedding ``Er``, without communication;
            ``"all_reduce"``, every rank returns the embedding ``E``; ``"reduce_scatter"``, each rank returns its
            ``1 / world_size`` of ``E`` along the sequence. The last two need ``process_group`` or ``device_mesh`` where
            there are several ranks, and the same ids on all of them.
        exchange: how rows travel: ``"dense"``, by the collective that adds incomplete embeddings up; ``"routed"``, each
            distinct row straight from its owner to who needs it; ``"auto"``, routed on CPUs and dense on accelerators.
            Values and gradients are the same, to the last bit on a CPU.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits: the last one; 0 for ids of ``[s, b]``.
        invalid_ids: what ids outside ``[0, vocab_size)``, negative ones included, give: ``"zero"``, a zero row on every
            rank; ``"error"``, an IndexError on every rank.
        padding_idx: a global id whose row is set to zero by ``reset_parameters`` and gets no gradient from lookups.
        padded_vocab_size: rows including padding, a multiple of ``world_size``, or ``"even"`` for the least such size
            (``shared.pad_vocab_size`` finds others). Padding comes last. It is zero, belongs to no id, gets no gradient from
            lookups and is never written to a file. A tied head of the caller's own gives it a gradient:
            ``zero_padding_grad`` removes that. Left out, there is no padding.
        sparse: make ``weight.grad`` a sparse COO tensor of the distinct rows asked for; eager mode only.
        init: ``"per_rank"``, as described above; ``"global"``, row i is a function of ``init_base_seed`` and i alone: the
            same bits in both frameworks, for any number of ranks and any padding; computed on the host. A callable is given
            the numbers ``[k]`` of the rows that this process holds, int64 on the table's device, without padding, and
            returns those rows, ``[k, emb_size]``: there is never a whole table. It is called with none where a rank has
            padding only. None leaves the rows uninitialised, to be loaded. In both cases padding and the row of
            ``padding_idx`` are zero, and ``init_mean``, ``init_std`` and ``init_base_seed`` are not used. Pickling a layer
            pickles the callable, by its name: a lambda cannot be.
        check: compare, in every forward, what all ranks of the group are about to compute, and raise on every rank if
            they disagree, or if two ranks hold the same rows, as after a broadcast. The environment variable
            ``PVE_CHECK=1`` does the same. It costs an exchange of a few hundred bytes, and on an accelerator the host
            waits for the device.
        gradient_accumulation_fusion: have backward add the rows' gradients straight to ``weight.main_grad``, or to
            ``weight.grad`` where there is no such tensor. A micro-batch then costs as much as its tokens, not as the table.
            The sums are those of ``main_grad.add_(grad)``. ``main_grad`` has the table's shape and device, and its dtype,
            float32 or a wider one. Autograd is handed nothing: DistributedDataParallel and hooks on the table are refused,
            ``torch.autograd.grad`` finds no gradient. ``fully_shard`` works. Eager mode only. The host waits for the device.

    Attributes:
        weight: parameter of shape ``[n, emb_size]``: the only entry of ``state_dict()``. With ``device_mesh`` a DTensor of
            shape ``[vocab_size, emb_size]``, or ``[padded_vocab_size, emb_size]`` where that was given.
        device_mesh: as given.
        config: the ``shared.EmbeddingConfig``: all options, each of them an attribute of the module too.
        partition: the ``shared.VocabPartition``: who owns what.
        rank: this rank.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; ``vocab_size`` is not divisible by ``world_size`` and not padded; ``rank``
            or ``world_size`` disagrees with ``process_group``; several ranks and neither ``rank`` nor a group; a reduction
            needs a group and there is none; ``device_mesh`` has several dimensions, or comes with ``process_group``,
            ``sparse`` or ``gradient_accumulation_fusion``.

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
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        >>> ParallelVocabEmbedding(12, 4, device_mesh=mesh["tp"]).weight.placements
        (Shard(dim=0),)
        >>> dist.destroy_process_group()
    """

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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        device_mesh: DeviceMesh | None = None,
        reduction: str = "none",
        exchange: str = "auto",
        seq_dim: int = -1,
        invalid_ids: str = "zero",
        padding_idx: int | None = None,
        padded_vocab_size: int | str | None = None,
        sparse: bool = False,
        init: Callable[[Tensor], Tensor] | str | None = "per_rank",
        check: bool = False,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__()
        process_group = resolve_mesh(device_mesh, process_group)
        source = "process_group" if device_mesh is None else "device_mesh"
        self.rank, size = resolve_rank(rank, world_size, process_group, source)
        self.device_mesh = device_mesh
        unpadded = device_mesh is not None and padded_vocab_size is None
        self.config = EmbeddingConfig(
            vocab_size,
            emb_size,
            size,
            "even" if unpadded else padded_vocab_size,
            reduction,
            exchange,
            seq_dim,
            invalid_ids,
            padding_idx,
            sparse,
            gradient_accumulation_fusion,
            init_mean,
            init_std,
            init_base_seed,
            init,
            checks_wanted(check),
        )
        for name in ("sparse", "gradient_accumulation_fusion"):
            if device_mesh is not None and getattr(self, name):
                raise ValueError(f"{name} must be False with device_mesh: a DTensor's gradient is a dense DTensor")
        self.table_rows = self.vocab_size if unpadded else self.padded_vocab_size
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise table_dtype_error(dtype)
        self._group_name = resolve_group(process_group, self.config.reduction, size)
        if check and size > 1 and process_group is None:
            raise ValueError("check=True compares the ranks of a process_group: pass it")
        self._rank_tensor = torch.tensor(self.rank, device="cpu")
        if device_mesh is None:  # a DTensor says itself whose rows it has
            self.mark_state_dicts()
        self.allocate(dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rank's rows again; padding rows and the row of ``padding_idx``, if owned, become zero.

        With ``init="per_rank"`` the numbers are those of ``torch.manual_seed(init_base_seed + rank)`` followed by
        ``nn.init.normal_``, in the table's dtype on its device. The caller's random state is left as it was. With
        ``init=None`` the other rows stay as they are. A table on the meta device stays so.
        """
        if not self.weight.is_meta:
            fill_table(*self.own_rows(), self.config, self.rank)

    def zero_padding_grad(self) -> None:
        """Set the gradient of padding rows to zero, in place.

        Lookups give padding rows no gradient. Whatever else uses the whole ``weight`` does, such as a tied head that
        computes ``hidden @ emb.weight.T``. Where there is one, call this after backward, before gradients are clipped and
        the optimizer steps: padding then stays zero. ``weight.grad`` and ``weight.main_grad`` are set; ``fully_shard`` may
        have split them. The row of ``padding_idx`` keeps what a head gives it, as that of ``nn.Embedding`` does.

        Example:
            >>> import torch
            >>> from torch_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(3, 2, padded_vocab_size=4)
            >>> (torch.ones(1, 2) @ emb.weight.T).sum().backward()
            >>> emb.zero_padding_grad()
            >>> emb.weight.grad[:, 0]
            tensor([1., 1., 1., 0.])
        """
        start, stop = self.partition.owned_range(self.rank)
        for grad in (self.weight.grad, getattr(self.weight, "main_grad", None)):
            if grad is not None and not grad.is_sparse:  # a sparse one has rows that were looked up, and no others
                rows, first = self.own_rows(grad)
                rows[max(stop - start - first, 0) :].zero_()

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
                ranks disagree; DistributedDataParallel took other ranks' rows for copies of this rank's.
            RuntimeError: a collective failed, because a rank has ended, say; the message names the operation.
        """
        config = self.config
        weight = self.rank_weight()
        if config.world_size > 1 and (problem := active_data_parallel_problem()) is not None:
            raise ValueError(problem)
        if config.check and self._group_name is not None:
            ids = agreed_ids(ids, weight, config, self._group_name)
        ids = checked_ids(ids, config)
        rank: int | Tensor = self.rank
        zero_padded = None
        if being_traced():
            # Ranks share a graph that takes the rank as data. The mask is fused; other memory would not follow the weight.
            rank = self._rank_tensor
        else:
            zero_padded = self.zero_padded(weight)
        if zero_padded is None:
            check_rows(weight, config, rank)
        sparse = config.sparse
        if config.gradient_accumulation_fusion and weight.requires_grad and torch.is_grad_enabled():
            sparse, weight = True, accumulate_in_place(weight)
        if config.reduction == "none" or config.world_size == 1:
            return lookup(weight, ids, config, rank, zero_padded, sparse)
        assert self._group_name is not None
        return reduced_lookup(weight, ids, config, self._group_name, zero_padded, sparse)

    def rank_weight(self) -> Tensor:
        """The rank's rows as a plain tensor that autograd follows: ``weight``, or with ``device_mesh`` its part here."""
        weight: Tensor = self.weight
        return weight if self.device_mesh is None else local_rows(weight)

    @property
    def embedding_dim(self) -> int:
        """``emb_size``, by its name in ``nn.Embedding``."""
        return self.emb_size

    @property
    def num_embeddings(self) -> int:
        """``vocab_size``, by its name in ``nn.Embedding``. Libraries that resize an embedding assign to it.

        Raises:
            ValueError: another number is assigned.
        """
        return self.vocab_size

    @num_embeddings.setter
    def num_embeddings(self, number: int) -> None:
        if number != self.vocab_size:
            raise ValueError(
                f"num_embeddings must stay {self.vocab_size}, got {number} (weight has {self.partition.rows_per_rank} "
                f"rows, those of one rank): resize the whole nn.Embedding, then build this layer by from_embedding"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and hasattr(value, "device_mesh") and self.device_mesh is None and self.world_size > 1:
            check_further_split(value, self)
        super().__setattr__(name, value)

    @property
    def group_name(self) -> str | None:
        """Name of the process group; None without one."""
        return self._group_name

    def extra_repr(self) -> str:
        text = f"{self.vocab_size}, {self.emb_size}, rank={self.rank}, world_size={self.world_size}"
        return ", ".join([text, *(f"{name}={value!r}" for name, value in self.config.changes().items())])


for _name in ("partition", *OPTIONS):
    setattr(ParallelVocabEmbedding, _name, property(attrgetter(f"config.{_name}"), doc=f"``config.{_name}``."))
