"""Run the PyTorch layer on a case, one module per rank.

Each rank is given its own rows only.
Without a reduction the ranks take turns in this process; with one, each is a process of a gloo group.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from shared.proof.case import Case
from shared.proof.harness import serve
from shared.proof.record import RecordWriter
from shared.tables.tensor_file import open_safetensors
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["run"]


def run(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record what every rank returns and its gradient, and the whole embedding."""
    if case.reduction == "none":
        _in_turn(case, record, progress)
    else:
        _in_a_group(case, record, progress)


def _in_turn(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    total: Tensor | None = None
    for rank in range(case.world_size):
        progress(f"rank {rank}", rank, case.world_size)
        partial, gradient = _forward_and_backward(case, rank, None)
        total = partial if total is None else total + partial
        record.add(f"forward.{rank}", _array(partial))
        record.add(f"gradient.{rank}", _array(gradient))
    assert total is not None
    record.add("sum", _array(total))


def _in_a_group(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    progress(f"{case.world_size} processes", 0, 2)
    with tempfile.TemporaryDirectory(prefix="pve-") as temporary:
        spawn(_one_process, (case, temporary), nprocs=case.world_size)
        progress("record", 1, 2)
        parts = []
        for rank in range(case.world_size):
            with open_safetensors(Path(temporary) / f"{rank}.safetensors") as file:
                parts.append(np.asarray(file.get_tensor("forward")))
                record.add(f"forward.{rank}", parts[-1])
                record.add(f"gradient.{rank}", np.asarray(file.get_tensor("gradient")))
    record.add("sum", case.whole_of(parts))


def _one_process(rank: int, case: Case, folder: str) -> None:
    """One rank of the group; its results go to a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=case.world_size)
    try:
        forward, gradient = _forward_and_backward(case, rank, dist.group.WORLD)
        save_file({"forward": forward.contiguous(), "gradient": gradient}, f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def _forward_and_backward(case: Case, rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    ids, grad_output = case.batch_array("ids"), case.part_of(case.batch_array("grad_output"), rank)
    if case.reduction == "all_to_all":  # each rank its own
        ids = case.part_of(ids, rank)
    upstream = _tensor(grad_output)
    emb = ParallelVocabEmbedding.from_table(
        case.weights,
        case.tensor,
        rank,
        case.world_size,
        group,
        vocab_size=case.vocab_size,
        **case.config.changes(),
    )
    output = emb(_tensor(ids))
    output.backward(upstream)
    assert emb.weight.grad is not None
    return output.detach(), emb.weight.grad


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


if __name__ == "__main__":
    serve("torch", {"torch": torch.__version__}, run)
