"""The PyTorch layer: one rank's part of a vocabulary-parallel embedding."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.agreement import checks_wanted
from shared.checks import table_dtype_error
from shared.config import OPTIONS, EmbeddingConfig
from torch_impl.accumulation import accumulate_in_place
from torch_impl.agreement import agreed_ids
from torch_impl.data_parallel import active_data_parallel_problem, check_further_split
from torch_impl.exchange import reduced_lookup
from torch_impl.files import TableInFiles
from torch_impl.ids import checked_ids, is_dtensor
from torch_impl.init import fill_table
from torch_impl.lookup import check_rows, lookup
from torch_impl.mesh import local_rows, resolve_mesh
from torch_impl.private_api import being_traced
from torch_impl.process_group import resolve_group, resolve_rank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ParallelVocabEmbedding"]


class ParallelVocabEmbedding(TableInFiles):
    """One rank's rows of a vocabulary-parallel embedding table.

    The rank holds rows ``[rank * n, (rank + 1) * n)``, ``n = padded_vocab_size // world_size``. It looks up the ids
    that it owns; others give rows of +0.0. The sum of all ranks' results is the embedding. ``docs/contract.md`` says
    what both backends promise.

    Args:
        vocab_size: rows of the whole table, divisible by ``world_size`` unless padded.
        emb_size: columns of the table.
        rank: this rank, in ``[0, world_size)``. Default: the group's, or 0 for a single rank.
        world_size: number of ranks. Default: the group's, or 1 without a group.
        process_group: the ranks. ``rank`` and ``world_size`` must agree with it.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws from its own generator, seeded ``init_base_seed + r``. Layers with equal seeds begin
            equal, and seed 42 on rank 1 is seed 43 on rank 0: choose seeds further apart than the number of ranks.
        dtype: float16, bfloat16, float32 or float64. Default: PyTorch's default dtype.
        device: where the table lives. Default: PyTorch's default device. ``"meta"`` allocates no storage: call
            ``to_empty`` and ``reset_parameters`` later.
        device_mesh: a one-dimensional ``DeviceMesh``, such as ``mesh["tp"]``, instead of ``process_group``. ``weight``
            is then a DTensor, ``Shard(0)``, which ``torch.distributed.checkpoint``, optimizers, gradient clipping and
            ``fully_shard`` over another mesh dimension understand.
            The number of ranks need not divide ``vocab_size``: the last ranks have fewer rows, or none.
        reduction: ``"none"``, the incomplete embedding ``Er``; ``"all_reduce"``, the embedding ``E`` on every rank;
            ``"reduce_scatter"``, this rank's ``1 / world_size`` of ``E`` along the sequence; ``"all_to_all"``, the
            embedding of this rank's own ids. With several ranks the last three need ``process_group`` or ``device_mesh``.
        exchange: ``"dense"``, a collective sums incomplete embeddings; ``"routed"``, owners send each distinct row to
            the ranks that need it; ``"auto"``, routed on CPUs and dense on accelerators. On a CPU both give the same
            bits, gradients included.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits: the last one; 0 for ids of ``[s, b]``.
        invalid_ids: result for ids outside ``[0, vocab_size)``, negative ones included, on every rank: ``"zero"``, a
            zero row; ``"error"``, an IndexError.
        padding_idx: a global id whose row is set to zero by ``reset_parameters`` and gets no gradient from lookups.
        padded_vocab_size: rows including padding, a multiple of ``world_size``, or ``"even"`` for the least such size
            (``shared.pad_vocab_size`` computes others). Default: no padding. Padding rows come last, are zero, belong to no
            id and are never written to a file. Lookups give them no gradient; for tied heads see ``zero_padding_grad``.
        sparse: make ``weight.grad`` a sparse COO tensor of the distinct rows; eager mode only.
        init: ``"per_rank"``, as ``init_base_seed`` describes; ``"global"``, row i is a function of ``init_base_seed``
            and i alone, computed on the host, with the same bits in both frameworks and for any number of ranks. A
            callable receives the global numbers ``[k]`` of this process's rows without padding, int64 on the table's
            device, and returns the rows ``[k, emb_size]``; k may be 0. Pickling a layer pickles the callable by name,
            so a lambda fails. None leaves rows uninitialised, for loading. Callables and None do not use
            ``init_mean``, ``init_std`` and ``init_base_seed``. Padding and the row of ``padding_idx`` are always zero.
        check: compare in every forward what the ranks are about to compute. All ranks raise if they disagree, or if two
            ranks hold the same rows. The environment variable ``PVE_CHECK=1`` does the same for every layer that has a
            group. It costs an all-gather of a few hundred bytes; the host waits for the device.
        gradient_accumulation_fusion: backward adds rows' gradients straight to ``weight.main_grad``, or to ``weight.grad``
            if there is no such tensor. A micro-batch then costs as much as its tokens, not as the table. The sums are those
            of ``main_grad.add_(grad)``. ``main_grad`` has the table's shape and device, and its dtype, float32 or a wider
            one. Autograd receives no gradient: DistributedDataParallel and hooks on the table are refused,
            ``torch.autograd.grad`` finds none; ``fully_shard`` works. Eager mode only; the host waits for the device.

    Attributes:
        weight: parameter ``[n, emb_size]``, the only entry of ``state_dict()``. With ``device_mesh`` a DTensor of
            ``[vocab_size, emb_size]``, or of ``[padded_vocab_size, emb_size]`` if that was given.
        device_mesh: as given.
        config: the ``shared.EmbeddingConfig``; each of its options is also an attribute of the module.
        partition: the ``shared.VocabPartition``, which maps ids to owners.
        rank: this rank.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; ``vocab_size`` is neither divisible by ``world_size`` nor padded; ``rank``
            or ``world_size`` disagrees with the group, or is needed and missing; a reduction has no group; ``device_mesh``
            has several dimensions, or comes with ``process_group``, ``sparse`` or ``gradient_accumulation_fusion``.

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
        if device_mesh is None:  # a DTensor knows its rows
            self.mark_state_dicts()
        self.allocate(dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the rank's rows; padding and ``padding_idx`` become zero.

        ``init="per_rank"`` draws the numbers of ``torch.manual_seed(init_base_seed + rank)`` followed by
        ``nn.init.normal_``, in the table's dtype on its device. The caller's random state does not change.
        ``init=None`` leaves other rows unchanged. A table on the meta device stays there.
        """
        if not self.weight.is_meta:
            fill_table(*self.own_rows(), self.config, self.rank)

    def zero_padding_grad(self) -> None:
        """Set the gradient of padding rows to zero, in place.

        Lookups give padding rows no gradient; other uses of the whole ``weight`` do, such as a tied head ``hidden @
        emb.weight.T``. Call this after backward, before clipping and the optimizer's step: padding then stays zero. It
        sets ``weight.grad`` and ``weight.main_grad``, also if ``fully_shard`` has split them. The row of
        ``padding_idx`` keeps the gradient that a head gives it, as in ``nn.Embedding``.

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
            if grad is not None and not grad.is_sparse:  # a sparse one has no padding rows
                rows, first = self.own_rows(grad)
                rows[max(stop - start - first, 0) :].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids.

        Args:
            ids: global ids, any shape, any integer dtype; not modified. The same on all ranks with ``"all_reduce"`` and
                ``"reduce_scatter"``.

        Returns:
            ``[*ids.shape, emb_size]`` on the ids' device in the table's dtype: the incomplete embedding ``Er`` or the
            embedding ``E``, as ``reduction`` says. ``"reduce_scatter"`` divides the ids' dimension ``seq_dim`` by
            ``world_size``. Rows are copied bit for bit.

        The gradient of ``"all_reduce"`` is local: all ranks must compute the same gradient of ``E``, as they do from
        the same loss.

        Raises:
            TypeError: ids are not a tensor of integers.
            IndexError: with ``invalid_ids="error"``; names the first invalid id, its position and the legal range.
            ValueError: the sequence of ``"reduce_scatter"`` is not divisible by ``world_size``; with ``check``, the
                ranks disagree; DistributedDataParallel has overwritten this rank's rows.
            RuntimeError: a collective failed, for example because a rank has ended; the message names the operation.
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
            # The rank is a tensor, so that ranks share a graph. Compilers fuse the mask; the padded table would be a
            # constant.
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
        """This rank's rows as a differentiable plain tensor, also with ``device_mesh``."""
        weight: Tensor = self.weight
        return weight if self.device_mesh is None else local_rows(weight)

    @property
    def embedding_dim(self) -> int:
        """``emb_size``, under its name in ``nn.Embedding``."""
        return self.emb_size

    @property
    def num_embeddings(self) -> int:
        """``vocab_size``, under its name in ``nn.Embedding``.

        Libraries assign to it when they resize an embedding.

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

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == "weight" and is_dtensor(value) and self.device_mesh is None and self.world_size > 1:
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
