"""The PyTorch layer: one rank's part of a vocabulary-parallel embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.checks import (
    check_choice,
    check_normal,
    check_padding_idx,
    check_seed,
    check_size,
    table_dtype_error,
)
from shared.partition import VocabPartition
from torch_impl.functional import lookup_checked
from torch_impl.placement import resolve_rank

__all__ = ["ParallelVocabEmbedding"]


class ParallelVocabEmbedding(nn.Module):
    """Rank ``rank``'s rows of an embedding table whose vocabulary is split over ``world_size`` ranks.

    The module keeps rows ``[rank * n, (rank + 1) * n)``, ``n = vocab_size // world_size``, looks up the ids it owns and
    returns all-zero rows for the others. No two ranks' results have a row in common: their sum is the full embedding.

    Args:
        vocab_size: rows of the whole table, all ranks together; must be divisible by ``world_size``.
        emb_size: columns of the table.
        rank: this rank, in ``[0, world_size)``. Left out: the group's, or 0 without a group.
        world_size: number of ranks. Left out: the group's, or 1 without a group.
        process_group: where ``rank`` and ``world_size`` come from; where they are given too, they must agree with it.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws its rows from a generator of its own, seeded ``init_base_seed + r``.
        dtype: float16, bfloat16, float32 or float64.
        device: where the table lives; ``"meta"`` builds it without storage (then ``to_empty`` and ``reset_parameters``).
        reduction: ``"none"``, each rank returns its own incomplete embedding.
        invalid_ids: what ids outside ``[0, vocab_size)``, negative ones included, give: ``"zero"``, a zero row on every
            rank; ``"error"``, an IndexError on every rank.
        padding_idx: a global id whose row is set to zero by ``reset_parameters`` and gets no gradient.
        sparse: make ``weight.grad`` a sparse COO tensor of the distinct rows asked for (not under torch.compile).
        init: ``"per_rank"``, the initialisation described above.

    Attributes:
        weight: parameter of shape ``[n, emb_size]``: the only entry of ``state_dict()``.
        partition: the ``shared.VocabPartition``, who owns what.
        rank: this rank.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; ``vocab_size`` is not divisible by ``world_size``; ``rank`` or
            ``world_size`` disagrees with ``process_group``.

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
        invalid_ids: str = "zero",
        padding_idx: int | None = None,
        sparse: bool = False,
        init: str = "per_rank",
    ) -> None:
        super().__init__()
        self.rank, world_size = resolve_rank(rank, world_size, process_group)
        self.partition = VocabPartition(vocab_size, world_size)
        self.emb_size = check_size("emb_size", emb_size)
        self.init_mean, self.init_std = check_normal(init_mean, init_std)
        self.init_base_seed = check_seed(init_base_seed, world_size)
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise table_dtype_error(dtype)
        self.reduction = check_choice("reduction", reduction, ("none",))
        self.invalid_ids = check_choice("invalid_ids", invalid_ids, ("zero", "error"))
        self.padding_idx = check_padding_idx(padding_idx, self.partition.vocab_size)
        self.sparse = bool(sparse)
        self.init = check_choice("init", init, ("per_rank",))
        # Compiled graphs take the rank as data, so that they are the same on every rank.
        self._rank_tensor = torch.tensor(self.rank, device="cpu")
        self.weight = nn.Parameter(torch.empty(self.partition.rows_per_rank, self.emb_size, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def vocab_size(self) -> int:
        """Rows of the whole table, all ranks together."""
        return self.partition.vocab_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.partition.world_size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rank's rows again, and set the row of ``padding_idx`` to zero where this rank owns it.

        The numbers are those of ``torch.manual_seed(init_base_seed + rank)`` followed by ``nn.init.normal_``, in the
        table's dtype on its device. The caller's random state is left as it was. A table on the meta device stays so.
        """
        if self.weight.is_meta:
            return
        generator = torch.Generator(self.weight.device).manual_seed(self.init_base_seed + self.rank)
        nn.init.normal_(self.weight, self.init_mean, self.init_std, generator=generator)
        if self.padding_idx is not None and self.partition.owns(self.padding_idx, self.rank):
            self.weight[self.partition.local_ids(self.padding_idx, self.rank)].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the ids that this rank owns; every other id gets a row of +0.0.

        Args:
            ids: global ids, any shape, any integer dtype; not modified.

        Returns:
            The incomplete embedding ``Er``, ``[*ids.shape, emb_size]``, on the ids' device in the table's dtype.

        Raises:
            TypeError: ids are not a tensor of integers.
            IndexError: with ``invalid_ids="error"``, naming the first id outside the vocabulary, its position and the
                legal range.
        """
        rank = self._rank_tensor if torch.compiler.is_compiling() else self.rank
        return lookup_checked(self.weight, ids, self.partition, rank, self.invalid_ids, self.padding_idx, self.sparse)

    def extra_repr(self) -> str:
        text = f"{self.vocab_size}, {self.emb_size}, rank={self.rank}, world_size={self.world_size}"
        defaults: dict[str, Any] = {"invalid_ids": "zero", "padding_idx": None, "sparse": False}
        changed = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        return ", ".join([text, *(f"{name}={value!r}" for name, value in changed.items())])
