"""One rank of the PyTorch exchange measurement: one candidate on gloo, in a fresh process with nothing faulted in."""

import json
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cases import Case, make_ids, peak_of
from benchmarks.peers.torch_layers import TorchRec, dtensor, fsdp2, megatron
from shared import VocabPartition
from torch_impl import ParallelVocabEmbedding

__all__ = ["main", "sent_bytes"]


def _ours(case: Case, exchange: str, sparse: bool = False) -> nn.Module:
    return ParallelVocabEmbedding(
        case.vocab_size,
        case.emb_size,
        process_group=dist.group.WORLD,
        dtype=getattr(torch, case.dtype),
        device="meta",
        reduction=case.reduction,
        exchange=exchange,
        sparse=sparse,
    )


def _with_rows(module: nn.Module, rows: Tensor) -> nn.Module:
    """The module with the rank's rows of the shared table."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, (TorchRec, FSDPModule)):  # they have memory of their own
        own = module.rows if isinstance(module, TorchRec) else module.weight.to_local()
        own.detach().copy_(rows)
        return module
    weight = module.weight
    if hasattr(weight, "to_local"):
        from torch.distributed.tensor import DTensor

        rows = DTensor.from_local(rows, weight.device_mesh, weight.placements)
    module.weight = nn.Parameter(rows)
    return module


def _candidates(case: Case, wanted: list[str]) -> dict[str, nn.Module]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "ours, auto": lambda: _ours(case, "auto"),
        "ours, routed": lambda: _ours(case, "routed"),
        "ours, dense": lambda: _ours(case, "dense"),
        "ours, sparse": lambda: _ours(case, "auto", sparse=True),
        "FSDP2": lambda: fsdp2(case),
        "torchrec": lambda: TorchRec(case),
        "Megatron-core": lambda: megatron(case),
        "DTensor": lambda: dtensor(case),
    }
    start, stop = VocabPartition(case.vocab_size, case.world_size).owned_range(dist.get_rank())
    rows = _rows_of(torch.arange(start, stop), case)
    return {name: _with_rows(makers[name](), rows) for name in wanted}


def _rows_of(ids: Tensor, case: Case) -> Tensor:
    """What stands in the table, known without it."""
    columns = torch.arange(case.emb_size, dtype=torch.int32)
    return (ids.to(torch.int32).unsqueeze(-1) * 7919 + columns).remainder_(8191).to(getattr(torch, case.dtype))


def _check_own_ids(module: nn.Module, case: Case, ids: Tensor, output: Tensor) -> None:
    """Compare the rows, and the gradient for an upstream of ones: how often each id occurs on all ranks."""
    rank = dist.get_rank()
    torch.testing.assert_close(output.detach(), _rows_of(ids[rank], case), rtol=0, atol=0)
    start, stop = VocabPartition(case.vocab_size, case.world_size).owned_range(rank)
    counts = torch.bincount(ids.reshape(-1), minlength=case.vocab_size)[start:stop].to(output.dtype)
    if isinstance(module, TorchRec):
        grad = _rows_of(torch.arange(start, stop), case) - module.rows
    else:
        grad = module.weight.grad
        grad = grad.to_local() if hasattr(grad, "to_local") else grad.to_dense()
    if isinstance(module, TorchRec) or hasattr(module.weight, "to_local"):
        counts = counts / case.world_size  # the mean of the ranks' gradients
    torch.testing.assert_close(grad, counts.unsqueeze(1).expand_as(grad), rtol=0, atol=0)


def sent_bytes() -> int:
    """Bytes that this machine has sent over its loopback interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


def _measure(case: Case, wanted: str, rounds: int) -> dict[str, Any]:
    """Seconds of the slowest rank, call by call; the first of them is not counted."""
    module, all_ids = _candidates(case, [wanted])[wanted], torch.from_numpy(make_ids(case))
    own_ids = case.reduction == "all_to_all"
    ids = all_ids[dist.get_rank()] if own_ids else all_ids
    times = np.zeros((rounds + 1, 2))
    sent, sent_with_backward, upstream = 0.0, 0.0, None
    for turn in range(rounds + 1):
        module.zero_grad()
        dist.barrier()
        before = sent_bytes()
        start = time.perf_counter()
        output = module(ids)
        between = time.perf_counter()
        if turn == 0:
            dist.barrier()
            sent = (sent_bytes() - before) / case.world_size
            upstream = torch.ones_like(output)
        output.backward(upstream)
        times[turn] = between - start, time.perf_counter() - start
        if turn == 0:
            dist.barrier()
            sent_with_backward = (sent_bytes() - before) / case.world_size
            if own_ids:
                _check_own_ids(module, case, all_ids, output)
        del output
    module.zero_grad()

    def step() -> None:
        dist.barrier()
        module(ids).backward(upstream)
        module.zero_grad()

    peak = torch.tensor([peak_of(step)])
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    slowest = torch.from_numpy(times[1:])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    forward, both = slowest.unbind(1)
    return {
        "forward": forward.tolist(),
        "forward_backward": both.tolist(),
        "sent_bytes": sent,
        "sent_bytes_with_backward": sent_with_backward,
        "peak_extra_bytes": peak.item(),
    }


def main() -> None:
    """Run as ``python -m benchmarks.torch_exchange RENDEZVOUS RANK SPEC RESULT``: one case and one candidate."""
    rendezvous, rank, spec, result = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    case = Case(**spec["case"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=case.world_size)
    # Megatron-core's sequence-parallel path allocates on the current CUDA device.
    with unittest.mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
        found = _measure(case, spec["candidate"], spec["rounds"])
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
