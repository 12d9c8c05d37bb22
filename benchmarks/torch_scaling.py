"""What one rank of w spends on a reduce_scatter, without a network: a process group that moves no bytes."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cases import FIRST, Case, make_ids, shuffled, timing, warm_pages
from torch_impl import ParallelVocabEmbedding

__all__ = ["main"]


def _measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.world_size)
    ids, dtype = torch.from_numpy(make_ids(case)), getattr(torch, case.dtype)
    layers = {
        f"ours, {exchange}": ParallelVocabEmbedding(
            case.vocab_size,
            case.emb_size,
            process_group=dist.group.WORLD,
            dtype=dtype,
            reduction=case.reduction,
            exchange=exchange,
        )
        for exchange in ("routed", "dense")
    }
    times = {name: np.zeros((rounds + 1, 2)) for name in layers}
    for turn in range(rounds + 1):  # the first is not counted
        for place in shuffled(len(layers), turn):
            name, layer = list(layers.items())[place]
            layer.weight.grad = None
            warm_pages(2**27)
            start = time.perf_counter()
            output = layer(ids)
            between = time.perf_counter()
            output.backward(torch.ones_like(output))
            times[name][turn] = between - start, time.perf_counter() - start
    dist.destroy_process_group()
    return {
        name: timing("forward", each[1:, 0]) | timing("forward_backward", each[1:, 1]) for name, each in times.items()
    }


def main() -> None:
    """Run as ``python -m benchmarks.torch_scaling SPEC RESULT``."""
    spec, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    warm_pages(FIRST)
    found = []
    for fields in spec["cases"]:
        found.append(_measure(Case(**fields), spec["rounds"]))
        print(json.dumps({"done": 1}), flush=True)
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
