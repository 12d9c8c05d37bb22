"""One rank of the PyTorch head measurement: one candidate in a fresh process."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import peak_of
from benchmarks.peers.torch_losses import Loss, dense, dtensor, megatron, torch_linear
from benchmarks.torch_exchange import sent_bytes
from shared import VocabPartition
from torch_impl import linear_cross_entropy

__all__ = ["main"]


def _ours(partition: VocabPartition) -> Loss:
    group = dist.group.WORLD if partition.world_size > 1 else None
    return lambda hidden, rows, targets: linear_cross_entropy(hidden, rows, targets, partition, group)


_MAKERS: dict[str, Callable[[VocabPartition], Loss]] = {
    "ours": _ours,
    "F.linear + F.cross_entropy": dense,
    "F.linear_cross_entropy": torch_linear,
    "Megatron-core": megatron,
    "DTensor loss_parallel": dtensor,
}


def _measure(spec: dict[str, Any], rank: int) -> dict[str, Any]:
    """Seconds of the slowest rank by round, bytes sent, peak memory of one step, and the loss."""
    tokens, vocab_size, emb_size, world_size = (spec[k] for k in ("tokens", "vocab_size", "emb_size", "world_size"))
    partition = VocabPartition(vocab_size, world_size)
    dtype = getattr(torch, spec["dtype"])
    torch.manual_seed(0)
    hidden = torch.randn(tokens, emb_size).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (tokens,))
    rows = torch.empty(partition.rows_per_rank, emb_size, dtype=dtype)
    torch.nn.init.normal_(rows, std=emb_size**-0.5, generator=torch.Generator().manual_seed(rank))
    rows.requires_grad_()
    compute = _MAKERS[spec["candidate"]](partition)
    value = torch.zeros(())

    def step() -> None:
        nonlocal value
        loss = compute(hidden, rows, targets)
        loss.backward()
        value = loss.detach()

    times, sent = [], 0.0
    for _ in range(spec["rounds"] + 1):
        hidden.grad = rows.grad = None
        _wait(world_size)
        before, start = sent_bytes(), time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        _wait(world_size)
        sent = (sent_bytes() - before) / world_size
    slowest = torch.tensor(times[1:])
    if world_size > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)

    def step_anew() -> None:
        hidden.grad = rows.grad = None
        step()

    # The gradients of the step before are there when the measurement starts, and are freed in it.
    peak = peak_of(step_anew) if spec["memory"] else float("nan")
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return {
        "times": slowest.tolist(),
        "sent_bytes": sent,
        "peak_bytes": peak,
        "loss": float(value),
    }


def _wait(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def main() -> None:
    """Run as ``python -m benchmarks.torch_head RENDEZVOUS RANK SPEC RESULT``."""
    rendezvous, rank, spec, result = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1 if spec["world_size"] > 1 else 2)
    if spec["world_size"] > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=spec["world_size"])
    found = _measure(spec, rank)
    if rank == 0:
        result.write_text(json.dumps(found))
    if spec["world_size"] > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
