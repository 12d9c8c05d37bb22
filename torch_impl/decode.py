"""Decoding over a split vocabulary: candidates travel, logits do not.

A candidate is an int64: its logit, ordered as integers, in the upper half, its id in the lower half. Equal logits are
thus ordered by id.
Shape suffixes: T tokens, N columns of the rank, K candidates, W ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from shared.head import check_logits_width, check_targets_shape, check_top_k, check_uniform, logits_dtype_error
from shared.partition import VocabPartition
from torch_impl.agreement import naming_the_operation
from torch_impl.head import FLOAT_DTYPES, owned_columns
from torch_impl.private_api import all_gather
from torch_impl.process_group import find_group, resolve_partition

__all__ = ["parallel_argmax", "parallel_sample", "parallel_top_k"]

_LOWEST = torch.iinfo(torch.int64).min
_ID_MASK = 2**32 - 1


def parallel_argmax(logits: Tensor, partition: VocabPartition, process_group: dist.ProcessGroup | None) -> Tensor:
    """Find the id of each token's greatest logit.

    Args:
        logits: this rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16 or float32. Padding columns are
            ignored.
        partition, process_group: as in ``parallel_top_k``.

    Returns:
        Global ids, int64 ``[*]``, the same on all ranks. Of equal logits the lowest id wins (-0.0 equals 0.0); NaN is
        greater than any number.

    Raises:
        TypeError, ValueError, RuntimeError: as ``parallel_top_k``.

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import parallel_argmax
        >>> parallel_argmax(torch.tensor([[1.0, 5.0, 5.0], [0.0, -1.0, 0.0]]), VocabPartition(3, 1), None)
        tensor([1, 0])
    """
    return parallel_top_k(logits, 1, partition, process_group)[1].squeeze(-1)


@torch.no_grad()
def parallel_top_k(
    logits: Tensor, k: int, partition: VocabPartition, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Find each token's k greatest logits, in descending order, and their ids.

    Each rank contributes ``min(k, rows_per_rank)`` candidates of eight bytes per token to one all-gather. There is no
    gradient.

    Args:
        logits: this rank's columns, ``[*, partition.rows_per_rank]``, float16, bfloat16 or float32. Padding columns are
            ignored.
        k: number of logits, at most ``partition.vocab_size``.
        partition: ownership of the columns; its ``world_size`` is the group's.
        process_group: the ranks; None if ``partition.world_size`` is 1.

    Returns:
        ``(values, ids)``, both ``[*, k]``, the same on all ranks. Values have the dtype of ``logits``, -0.0 as 0.0 and
        one kind of NaN. Ids are global, int64. Of equal logits the lower id comes first; NaN precedes all numbers.

    Raises:
        TypeError: logits have another dtype, or k is not an integer.
        ValueError: logits do not have one rank's width, or k is out of range.
        RuntimeError: a collective failed; the message names it.

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import parallel_top_k
        >>> parallel_top_k(torch.tensor([1.0, 5.0, 5.0, 2.0]), 3, VocabPartition(4, 1), None)
        (tensor([5., 5., 2.]), tensor([1, 2, 3]))
    """
    rank, group = _checked(logits, partition, process_group)
    if logits.dtype == torch.float64:
        raise logits_dtype_error("logits", logits.dtype, "float16, bfloat16 or float32")
    k, n, owned = check_top_k(k, partition.vocab_size), partition.rows_per_rank, owned_columns(partition, rank)
    logits_TN = logits.reshape(-1, n)
    found_TK = _candidates(logits_TN[:, :owned], partition.start(rank)).topk(min(k, owned)).values
    mine_TK = found_TK.new_full((len(found_TK), min(k, n)), _LOWEST)
    mine_TK[:, : found_TK.shape[1]] = found_TK
    everyones_TK = _gather(mine_TK, group, "candidates of the top k").movedim(0, 1).flatten(1)
    values, ids = _unpacked(everyones_TK.topk(k).values)
    shape = *logits.shape[:-1], k
    return values.to(logits.dtype).view(shape), ids.view(shape)


@torch.no_grad()
def parallel_sample(
    logits: Tensor, partition: VocabPartition, process_group: dist.ProcessGroup | None, *, uniform: Tensor
) -> Tensor:
    """Draw one id per token from the distribution of its logits.

    Probabilities are summed in float64, in the order of ids. Each rank sends two numbers, then one id, per token.
    The host waits for the device to check ``uniform``.

    Args:
        logits: this rank's columns, ``[*, partition.rows_per_rank]``, any floating dtype. Divide them by the temperature
            first. Padding columns are ignored.
        partition, process_group: as in ``parallel_top_k``.
        uniform: a random number in [0, 1) per token, ``[*]``, the same on all ranks.

    Returns:
        Global ids, int64 ``[*]``, the same on all ranks: the smallest id whose cumulative probability exceeds
        ``uniform``. Logits with NaN or +inf, or all -inf, have no distribution and give -1.

    Raises:
        TypeError: logits or uniform are not floating.
        ValueError: a shape does not fit, or a number of ``uniform`` is outside [0, 1).
        RuntimeError: a collective failed; the message names it.

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import parallel_sample
        >>> logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(2, 3)
        >>> parallel_sample(logits, VocabPartition(3, 1), None, uniform=torch.tensor([0.2, 0.9]))
        tensor([0, 2])
    """
    rank, group = _checked(logits, partition, process_group)
    if not isinstance(uniform, Tensor) or uniform.dtype not in FLOAT_DTYPES:
        raise logits_dtype_error("uniform", getattr(uniform, "dtype", type(uniform).__name__))
    check_targets_shape(uniform.shape, logits.shape[:-1], "logits", "uniform")
    check_uniform(bool(((uniform >= 0) & (uniform < 1)).all()))
    uniform_T = uniform.reshape(-1).double()
    owned = owned_columns(partition, rank)
    logits_TN = logits.reshape(-1, partition.rows_per_rank)[:, :owned]
    maximum_T = logits_TN.new_full((len(logits_TN),), -torch.inf) if owned == 0 else logits_TN.amax(1)
    shift_T = maximum_T.masked_fill(maximum_T == -torch.inf, 0)
    cumulative_TN = (logits_TN - shift_T.unsqueeze(1)).double().exp_().cumsum(1)
    total_T = cumulative_TN[:, -1] if owned else maximum_T.new_zeros(len(maximum_T), dtype=torch.float64)
    statistics = torch.stack([maximum_T.double(), total_T])
    maxima_WT, totals_WT = _gather(statistics, group, "totals of the sampling").unbind(1)
    scales_WT = (maxima_WT - maxima_WT.amax(0)).exp()
    bounds_WT = (totals_WT * scales_WT).cumsum(0)  # where each rank's cumulative sums end
    threshold_T = uniform_T * bounds_WT[-1]
    before_T = bounds_WT[rank - 1] if rank else torch.zeros_like(threshold_T)
    # The last sum is set to the bound: rounding could leave a token without an owner.
    own_TN = before_T.unsqueeze(1) + cumulative_TN * scales_WT[rank].unsqueeze(1)
    if owned:
        own_TN[:, -1] = bounds_WT[rank]
    above_TN = own_TN > threshold_T.unsqueeze(1)
    ids_T = torch.full_like(threshold_T, -1, dtype=torch.int64)
    if owned:
        first = above_TN.int().argmax(1) + partition.start(rank)
        ids_T = torch.where((before_T <= threshold_T) & above_TN.any(1), first, ids_T)
    return _gather(ids_T, group, "ids of the sampling").amax(0).view(uniform.shape)


def _checked(
    logits: object, partition: VocabPartition, process_group: dist.ProcessGroup | None
) -> tuple[int, dist.ProcessGroup | None]:
    """Validate a rank's logits; return the rank and the group."""
    if not isinstance(logits, Tensor) or logits.dtype not in FLOAT_DTYPES:
        raise logits_dtype_error("logits", getattr(logits, "dtype", type(logits).__name__))
    check_logits_width(logits.shape[-1] if logits.dim() else 1, partition)
    rank, name = resolve_partition(partition, process_group)
    return rank, find_group(name, rank, partition.world_size) if name else None


def _candidates(logits_TN: Tensor, start: int) -> Tensor:
    """Pack logits and ids into int64, ordered by logit, then id descending."""
    x = logits_TN.float() + 0.0  # -0.0 becomes 0.0
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)  # NaN without its sign bit is above all numbers
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(start, start + logits_TN.shape[1], device=logits_TN.device)
    return (ordered << 32) | (_ID_MASK - ids)


def _unpacked(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ids of candidates."""
    ordered = (candidates >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _ID_MASK - (candidates & _ID_MASK)


def _gather(mine: Tensor, group: dist.ProcessGroup | None, what: str) -> Tensor:
    """Gather every rank's tensor, ``[W, *]``."""
    if group is None:
        return mine.unsqueeze(0)
    everyones = mine.new_empty(group.size(), *mine.shape)
    with naming_the_operation(f"all_gather of the {what}", group):
        all_gather(everyones.view(-1), mine.reshape(-1), group=group)
    return everyones
