"""One rank of the PyTorch head measurement: one candidate in a fresh process."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import peak_of
from benchmarks.torch_exchange import sent_bytes
from shared import VocabPartition
from torch_impl import linear_cross_entropy

__all__ = ["main"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(hidden [T, e], rows [n, e], targets [T])`` to the mean loss."""


def _ours(partition: VocabPartition) -> Loss:
    group = dist.group.WORLD if partition.world_size > 1 else None
    return lambda hidden, rows, targets: linear_cross_entropy(hidden, rows, targets, partition, group)


def _dense(partition: VocabPartition) -> Loss:
    return lambda hidden, rows, targets: F.cross_entropy(F.linear(hidden, rows), targets)


def _torch_linear(partition: VocabPartition) -> Loss:
    return F.linear_cross_entropy


def _megatron(partition: VocabPartition) -> Loss:
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=partition.world_size)

    def loss(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(copy_to_tensor_model_parallel_region(hidden), rows)
        return vocab_parallel_cross_entropy(logits, targets).mean()

    return loss


def _dtensor(partition: VocabPartition) -> Loss:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = dist.init_device_mesh("cpu", (partition.world_size,))

    def loss(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        logits = F.linear(whole, DTensor.from_local(rows, mesh, [Shard(0)], run_check=False))
        return F.cross_entropy(logits, targets)

    loss_parallel().__enter__()  # for the backward too, in all of this process
    return loss


_MAKERS: dict[str, Callable[[VocabPartition], Loss]] = {
    "ours": _ours,
    "F.linear + F.cross_entropy": _dense,
    "F.linear_cross_entropy": _torch_linear,
    "Megatron-core": _megatron,
    "DTensor loss_parallel": _dtensor,
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
