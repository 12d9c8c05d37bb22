"""Lookups as pure functions of one rank's rows."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.checks import REDUCTIONS, check_choice, table_dtype_error
from shared.config import EmbeddingConfig
from shared.partition import VocabPartition
from torch_impl.exchange import reduced_lookup as lookup_over_group
from torch_impl.ids import check_plain, checked_ids
from torch_impl.lookup import check_rows, lookup
from torch_impl.process_group import resolve_group, resolve_rank

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
    """Look up the ids owned by ``rank``; others get rows of +0.0.

    The sum of all ranks' results is the embedding. Order of sums and transforms: ``docs/contract.md``.

    Args:
        weight: the rank's own rows, any floating dtype: ``[partition.rows_per_rank, emb_size]``, or without its padding
            rows, ``partition.owned_range(rank)``. The latter is how DTensor's ``Shard(0)`` splits a table that does not
            divide; its partition has ``padded_vocab_size="even"``.
        ids: global ids, any shape, any integer dtype; not modified.
        partition: ownership of the rows.
        rank: the owner of ``weight``.
        invalid_ids: result for ids outside ``[0, vocab_size)``, negative ones included, on every rank: ``"zero"``, a
            row of +0.0; ``"error"``, an IndexError, for which the host waits for the device.
        padding_idx: a global id whose row gets no gradient. Its row is looked up like any other.
        sparse: make the weight's gradient a sparse COO tensor of the distinct rows (not under torch.compile).

    Returns:
        ``[*ids.shape, emb_size]`` on the ids' device in the weight's dtype. Rows are copied bit for bit.

    The weight's gradient has the weight's shape. For 16-bit tables it is summed in float32 and rounded once. Reverse
    mode is defined to any order; forward mode is not.

    Raises:
        TypeError: ids are not a tensor of integers; the weight's dtype is not floating; either is a DTensor.
        ValueError: ``weight`` has another number of rows; another argument is out of range.
        IndexError: with ``invalid_ids="error"``; names the first invalid id, its position and the legal range.

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
    config = _config(weight, partition, rank, invalid_ids=invalid_ids, padding_idx=padding_idx, sparse=sparse)
    return lookup(weight, checked_ids(ids, config), config, rank, sparse=sparse)


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
    """Sum the ranks' ``partial_lookup`` over a process group.

    Every rank of the group calls this with the same options.

    Args:
        weight: this rank's own rows as in ``partial_lookup``, in float16, bfloat16, float32 or float64.
        ids: global ids, any shape, any integer dtype; not modified. The same on all ranks; with ``"all_to_all"`` each
            rank passes its own, of any shape.
        partition: ownership of the rows; its ``world_size`` is the group's.
        process_group: the ranks; None if ``partition.world_size`` is 1.
        reduction: ``"all_reduce"``, the embedding on every rank; ``"reduce_scatter"``, this rank's chunk of it;
            ``"all_to_all"``, the embedding of this rank's own ids.
        exchange: ``"dense"``, a collective sums incomplete embeddings; ``"routed"``, owners send each distinct row to
            the ranks that need it; ``"auto"``, routed on CPUs and dense on accelerators. Results are equal.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits.
        invalid_ids, padding_idx, sparse: as in ``partial_lookup``.

    Returns:
        ``[*ids.shape, emb_size]`` on the ids' device in the weight's dtype. ``"reduce_scatter"`` divides the dimension
        ``seq_dim`` by ``partition.world_size``. Rows are copied bit for bit; invalid ids give +0.0.

    The gradient of ``"all_reduce"`` is local: all ranks must compute the same gradient of the embedding. That of
    ``"reduce_scatter"`` sums the gradients of all chunks. For 16-bit tables gradients are summed in float32 and rounded
    once.

    Raises:
        TypeError: ids are not a tensor of integers; the weight's dtype is not one of the four; either is a DTensor.
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
    check_choice("reduction", reduction, REDUCTIONS[1:])
    options = {"reduction": reduction, "exchange": exchange, "seq_dim": seq_dim, "sparse": sparse}
    rank, _ = resolve_rank(0 if process_group is None else None, partition.world_size, process_group)
    config = _config(weight, partition, rank, invalid_ids=invalid_ids, padding_idx=padding_idx, **options)
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise table_dtype_error(weight.dtype)
    group_name = resolve_group(process_group, reduction, partition.world_size)
    ids = checked_ids(ids, config)
    if group_name is None or partition.world_size == 1:
        return lookup(weight, ids, config, rank, sparse=sparse)
    return lookup_over_group(weight, ids, config, group_name, sparse=sparse)


def _config(weight: Tensor, partition: VocabPartition, rank: int | Tensor, **options: Any) -> EmbeddingConfig:
    check_plain("weight", weight, "to_local() of it if it is split as the partition says, else full_tensor()")
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, the rank's rows and emb_size, got {list(weight.shape)}")
    sizes = partition.vocab_size, weight.shape[1], partition.world_size, partition.padded_vocab_size
    config = EmbeddingConfig(*sizes, **options)
    check_rows(weight, config, rank)
    return config
