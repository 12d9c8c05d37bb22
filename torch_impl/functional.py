"""The lookup as pure functions of one rank's rows."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from shared.checks import EXCHANGES, REDUCTIONS, as_int, check_choice, check_padding_idx
from shared.partition import VocabPartition
from torch_impl.ids import as_ids, check_ids
from torch_impl.placement import resolve_group, resolve_rank
from torch_impl.reductions import ReductionOptions, reduce_lookup
from torch_impl.rows import take_own

__all__ = ["partial_lookup", "reduced_lookup"]


def partial_lookup(
    weight: Tensor,
    ids: Tensor,
    partition: VocabPartition,
    rank: int,
    *,
    invalid_ids: str = "zero",
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look up the ids that ``rank`` owns; every other id gets a row of +0.0. The ranks' results sum to the embedding.

    Args:
        weight: the rank's own rows, ``[partition.rows_per_rank, emb_size]``, any floating dtype.
        ids: global ids, any shape, any integer dtype. They are not modified, and no dtype wraps.
        partition: who owns what.
        rank: whose rows ``weight`` holds.
        invalid_ids: what an id outside ``[0, vocab_size)``, negative ones included, gives on every rank: ``"zero"``, a
            row of +0.0; ``"error"``, an IndexError (which waits for the device to know).
        padding_idx: a global id whose row gets no gradient. Its row is looked up like any other.
        sparse: make the weight's gradient a sparse COO tensor of the distinct rows asked for (not under torch.compile).

    Returns:
        ``[*ids.shape, emb_size]`` on the ids' device in the weight's dtype. Rows are copied bit for bit. Where the
        weight lives on another device, only the rows it owns travel.

    The weight's gradient sums a row's occurrences in float32 for 16-bit tables (in the table's dtype otherwise) and rounds
    once. Eager CPU sums run in the order of the tokens. First and second derivatives are defined, forward mode too.

    Raises:
        TypeError: ids are not a tensor of integers.
        ValueError: ``weight`` does not have ``partition.rows_per_rank`` rows; another argument is out of range.
        IndexError: with ``invalid_ids="error"``, naming the first such id, its position and the legal range.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import partial_lookup
        >>> table = torch.arange(8.0).reshape(4, 2)
        >>> halves = VocabPartition(vocab_size=4, world_size=2)
        >>> ids = torch.tensor([0, 3, 2])
        >>> partial_lookup(table[2:], ids, halves, rank=1)
        tensor([[0., 0.],
                [6., 7.],
                [4., 5.]])
        >>> partial_lookup(table[:2], ids, halves, 0) + partial_lookup(table[2:], ids, halves, 1)
        tensor([[0., 1.],
                [6., 7.],
                [4., 5.]])
    """
    _check_arguments(weight, partition, invalid_ids, padding_idx)
    return lookup_checked(weight, ids, partition, rank, invalid_ids, padding_idx, sparse)


def reduced_lookup(
    weight: Tensor,
    ids: Tensor,
    partition: VocabPartition,
    process_group: dist.ProcessGroup | None,
    *,
    reduction: str,
    exchange: str = "auto",
    seq_dim: int = -1,
    invalid_ids: str = "zero",
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look ids up in a table that is split over the ranks of a process group: the sum of their ``partial_lookup``.

    Every rank of the group calls this with the same ids and options.

    Args:
        weight: this rank's own rows, ``[partition.rows_per_rank, emb_size]``, any floating dtype.
        ids: global ids, any shape, any integer dtype; the same on all ranks; not modified.
        partition: who owns what; its ``world_size`` is the group's.
        process_group: the ranks; None where ``partition.world_size`` is 1.
        reduction: ``"all_reduce"``, the embedding on every rank; ``"reduce_scatter"``, this rank's chunk of it.
        exchange: ``"dense"``, the collective that adds incomplete embeddings up; ``"routed"``, each distinct row straight
            from its owner to who needs it; ``"auto"``, whichever is faster by measured rules. The results are equal.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits.
        invalid_ids, padding_idx, sparse: as in ``partial_lookup``.

    Returns:
        ``[*ids.shape, emb_size]`` on the ids' device in the weight's dtype, for ``"reduce_scatter"`` with the dimension
        ``seq_dim`` divided by ``partition.world_size``. Rows are copied bit for bit; ids outside the vocabulary give
        +0.0.

    The gradient of ``"all_reduce"`` is local: each rank must come to the same gradient of the embedding. That of
    ``"reduce_scatter"`` brings each rank what all chunks have for the rows it owns. Sums are float32 for 16-bit tables
    and rounded once.

    Raises:
        TypeError: ids are not a tensor of integers.
        ValueError: an argument is out of range, or the sequence is not divisible by ``partition.world_size``.
        IndexError: with ``invalid_ids="error"``.
        RuntimeError: a collective failed; the message names it.

    Source: Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053) and its sequence parallelism (Korthikanti et al., 2022,
    arXiv:2205.05198).

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import reduced_lookup
        >>> table = torch.arange(8.0).reshape(4, 2)
        >>> reduced_lookup(table, torch.tensor([3, 0, -1]), VocabPartition(4, 1), None, reduction="all_reduce")
        tensor([[6., 7.],
                [0., 1.],
                [0., 0.]])
    """
    _check_arguments(weight, partition, invalid_ids, padding_idx)
    check_choice("reduction", reduction, REDUCTIONS[1:])
    check_choice("exchange", exchange, EXCHANGES)
    resolve_rank(None, partition.world_size, process_group)
    options = ReductionOptions(
        reduction,
        exchange,
        as_int("seq_dim", seq_dim),
        padding_idx,
        sparse,
        resolve_group(process_group, reduction, partition.world_size),
    )
    ids = check_ids(ids, partition.vocab_size) if invalid_ids == "error" else as_ids(ids)
    return reduce_lookup(weight, ids, partition, options)


def _check_arguments(weight: Tensor, partition: VocabPartition, invalid_ids: str, padding_idx: int | None) -> None:
    if weight.dim() != 2 or weight.shape[0] != partition.rows_per_rank:
        raise ValueError(
            f"weight must hold the rank's own rows, [{partition.rows_per_rank}, emb_size], got {tuple(weight.shape)}"
        )
    check_choice("invalid_ids", invalid_ids, ("zero", "error"))
    check_padding_idx(padding_idx, partition.vocab_size)


def lookup_checked(
    weight: Tensor,
    ids: Tensor,
    partition: VocabPartition,
    rank: int | Tensor,
    invalid_ids: str,
    padding_idx: int | None,
    sparse: bool,
) -> Tensor:
    """``partial_lookup`` for a caller that has checked all but the ids; ``rank`` may be a 0-d tensor."""
    ids = check_ids(ids, partition.vocab_size) if invalid_ids == "error" else as_ids(ids)
    return take_own(weight, ids, partition, rank, padding_idx, sparse)
