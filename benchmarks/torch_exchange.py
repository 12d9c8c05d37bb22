"""One rank of the PyTorch exchange measurement: one candidate on gloo, in a fresh process with nothing faulted in."""

from __future__ import annotations

import json
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cases import Case, make_ids
from torch_impl import ParallelVocabEmbedding

__all__ = ["main", "sent_bytes"]


def _ours(case: Case, exchange: str) -> nn.Module:
    return ParallelVocabEmbedding(
        case.vocab_size,
        case.emb_size,
        process_group=dist.group.WORLD,
        dtype=getattr(torch, case.dtype),
        device="meta",
        reduction=case.reduction,
        exchange=exchange,
    )


def _megatron(case: Case) -> nn.Module:
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    config = ModelParallelConfig(
        tensor_model_parallel_size=case.world_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=getattr(torch, case.dtype),
        sequence_parallel=case.reduction == "reduce_scatter",
    )
    return VocabParallelEmbedding(
        case.vocab_size,
        case.emb_size,
        init_method=nn.init.normal_,
        config=config,
        reduce_scatter_embeddings=case.reduction == "reduce_scatter",
        tp_group=dist.group.WORLD,
    )


def _dtensor(case: Case) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (case.world_size,))
    layout = Shard(1) if case.reduction == "reduce_scatter" else Replicate()
    embedding = nn.Embedding(case.vocab_size, case.emb_size, dtype=getattr(torch, case.dtype), device="meta")
    return parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=layout))


def _with_rows(module: nn.Module, rows: Tensor) -> nn.Module:
    """The module with the shared table, so that all candidates read the same memory."""
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
        "Megatron-core": lambda: _megatron(case),
        "DTensor": lambda: _dtensor(case),
    }
    rows = torch.randn(case.vocab_size // case.world_size, case.emb_size).to(getattr(torch, case.dtype))
    return {name: _with_rows(makers[name](), rows) for name in wanted}


def sent_bytes() -> int:
    """Bytes that this machine has sent over its loopback interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


def _measure(case: Case, wanted: str, rounds: int) -> dict[str, Any]:
    """Seconds of the slowest rank, call by call; the first of them is not counted."""
    module, ids = _candidates(case, [wanted])[wanted], torch.from_numpy(make_ids(case))
    times = np.zeros((rounds + 1, 2))
    sent, upstream = 0.0, None
    for turn in range(rounds + 1):
        module.weight.grad = None
        dist.barrier()
        before = sent_bytes()
        start = time.perf_counter()
        output = module(ids)
        between = time.perf_counter()
        if turn == 0:
            dist.barrier()
            sent = (sent_bytes() - before) / case.world_size
            upstream = torch.randn_like(output)
        output.backward(upstream)
        times[turn] = between - start, time.perf_counter() - start
        del output
    slowest = torch.from_numpy(times[1:])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    forward, both = slowest.unbind(1)
    return {"forward": forward.tolist(), "forward_backward": both.tolist(), "sent_bytes": sent}


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
