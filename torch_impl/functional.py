"""The lookup as a pure function of one rank's rows."""

from __future__ import annotations

from torch import Tensor

from shared.checks import check_choice, check_padding_idx
from shared.partition import VocabPartition
from torch_impl.ids import as_ids, check_ids
from torch_impl.rows import take_rows

__all__ = ["partial_lookup"]


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
    if weight.dim() != 2 or weight.shape[0] != partition.rows_per_rank:
        raise ValueError(
            f"weight must hold the rank's own rows, [{partition.rows_per_rank}, emb_size], got {tuple(weight.shape)}"
        )
    check_choice("invalid_ids", invalid_ids, ("zero", "error"))
    check_padding_idx(padding_idx, partition.vocab_size)
    return lookup_checked(weight, ids, partition, rank, invalid_ids, padding_idx, sparse)


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
    local, owned = partition.local_ids(ids, rank), partition.owns(ids, rank)
    counted = None if padding_idx is None else owned & (ids != padding_idx)
    return take_rows(weight, local, owned, counted, sparse)
