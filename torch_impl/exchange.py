"""The direct exchange: each distinct row goes from its one owner straight to the ranks that need it.

Every rank knows all the ids, so each works out what it sends and what it gets: no counts are exchanged. Shape suffixes: W
ranks, C tokens of a chunk, E columns, K distinct rows that this rank's chunk needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared.partition import VocabPartition
from torch_impl.faults import naming_the_operation
from torch_impl.local.sums import sum_distinct

__all__ = ["ChunkRoutes", "distinct_ids", "gather_everywhere"]


class ChunkRoutes:
    """Who sends which rows to whom, so that each rank gets the rows of its own chunk of the ids.

    Args:
        ids_WC: all the ids, int64, chunk by chunk; on the table's device.
        partition: who owns what.
        rank: this rank.
        group: where the ranks are.
    """

    def __init__(self, ids_WC: Tensor, partition: VocabPartition, rank: int, group: dist.ProcessGroup) -> None:
        self._group = group
        n, w = partition.rows_per_rank, partition.world_size
        cuts = torch.arange(w + 1, device=ids_WC.device) * n
        # Ids outside the vocabulary become n * w: one more row, the last, which stays zero.
        mine_C = ids_WC[rank]
        wanted_K, self._slots_C = distinct_ids(mine_C, partition)
        self._num_slots = len(wanted_K)
        destinations = torch.arange(w, device=ids_WC.device).unsqueeze(1)
        keys = (destinations * n + partition.local_ids(ids_WC, rank))[partition.owns(ids_WC, rank)].unique()
        self.rows_to_send = keys % n
        bounds = torch.stack([torch.searchsorted(wanted_K, cuts), torch.searchsorted(keys, cuts)])
        # On an accelerator the host waits here, once: the collective needs the sizes.
        self._recv_counts, self._send_counts = bounds.diff().tolist()
        self._num_wanted = sum(self._recv_counts)

    def gather(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """The rows of this rank's chunk, ``[*shape, E]``."""
        recv_KE = weight.new_empty(self._num_slots, weight.shape[1])
        recv_KE[self._num_wanted :] = 0
        send = weight.index_select(0, self.rows_to_send)
        with naming_the_operation("all_to_all_single of the embedding's forward (routed reduce_scatter)", self._group):
            dist.all_to_all_single(
                recv_KE[: self._num_wanted], send, self._recv_counts, self._send_counts, group=self._group
            )
        return F.embedding(self._slots_C.view(*shape), recv_KE)

    def scatter(self, grad_CE: Tensor) -> Tensor:
        """For each of ``rows_to_send``, the sum of its gradients over the chunk it went to; float32 for 16-bit ones."""
        _slots, sums_KE = sum_distinct(grad_CE, self._slots_C, self._slots_C < self._num_wanted, wide=True)
        recv = sums_KE.new_empty(len(self.rows_to_send), sums_KE.shape[1])
        with naming_the_operation("all_to_all_single of the embedding's backward (routed reduce_scatter)", self._group):
            dist.all_to_all_single(recv, sums_KE, self._send_counts, self._recv_counts, group=self._group)
        return recv


def distinct_ids(ids: Tensor, partition: VocabPartition) -> tuple[Tensor, Tensor]:
    """The distinct ids, ascending, all those outside the vocabulary as one past its end; and where each of the ids is."""
    wanted, slots = torch.where(partition.is_valid(ids), ids, partition.padded_vocab_size).unique(return_inverse=True)
    return wanted, slots


def gather_everywhere(
    weight: Tensor, wanted: Tensor, slots: Tensor, partition: VocabPartition, rank: int, group: dist.ProcessGroup
) -> Tensor:
    """The rows of all the ids, ``[*slots.shape, E]``, on every rank: each owner broadcasts the distinct ones it has.

    A broadcast goes round by way of the other ranks, so that an owner of most of the rows need not send each of them
    ``W - 1`` times by itself.

    Args:
        weight: this rank's rows, ``[N, E]``.
        wanted, slots: the ids, as ``distinct_ids`` has them.
        partition: who owns what.
        rank: this rank.
        group: where the ranks are.
    """
    n, w = partition.rows_per_rank, partition.world_size
    bounds = torch.searchsorted(wanted, torch.arange(w + 1, device=wanted.device) * n).tolist()
    rows = weight.new_empty(len(wanted), weight.shape[1])
    rows[bounds[w] :] = 0
    mine = slice(bounds[rank], bounds[rank + 1])
    torch.index_select(weight, 0, partition.local_ids(wanted[mine], rank), out=rows[mine])
    with naming_the_operation("broadcast of the embedding's forward (routed all_reduce)", group):
        under_way = [
            dist.broadcast(rows[start:stop], group=group, group_src=owner, async_op=True)
            for owner, (start, stop) in enumerate(itertools.pairwise(bounds))
            if start < stop
        ]
        for work in under_way:
            work.wait()
    return F.embedding(slots, rows)
