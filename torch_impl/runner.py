"""Run the PyTorch layer on a case, one module per rank.

Each rank is given its own rows only.
Without a reduction the ranks take turns in this process; with one, each is a process of a gloo group.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from shared.proof.case import Case
from shared.proof.launch import serve
from shared.proof.record import RecordWriter
from shared.tables.tensor_file import open_safetensors
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["run", "run_processes", "to_numpy", "to_torch"]


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
        record.add(f"forward.{rank}", to_numpy(partial))
        record.add(f"gradient.{rank}", to_numpy(gradient))
    assert total is not None
    record.add("sum", to_numpy(total))


def _in_a_group(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    progress(f"{case.world_size} processes", 0, 2)
    parts = []
    for rank, arrays in enumerate(run_processes(_one_rank, case)):
        parts.append(arrays["forward"])
        record.add(f"forward.{rank}", arrays["forward"])
        record.add(f"gradient.{rank}", arrays["gradient"])
    record.add("sum", case.whole_of(parts))


def _one_rank(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    forward, gradient = _forward_and_backward(case, rank, group)
    return {"forward": forward, "gradient": gradient}


def run_processes(
    function: Callable[[Any, int, dist.ProcessGroup], dict[str, Tensor]], case: Case
) -> Iterator[dict[str, np.ndarray]]:
    """Run ``function`` in one process per rank; yield each rank's arrays."""
    with tempfile.TemporaryDirectory(prefix="pve-") as temporary:
        spawn(_one_process, (function, case, temporary), nprocs=case.world_size)
        for rank in range(case.world_size):
            with open_safetensors(Path(temporary) / f"{rank}.safetensors") as file:
                yield {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _one_process(rank: int, function: Callable[..., dict[str, Tensor]], case: Case, folder: str) -> None:
    """One rank of the group; its results go to a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=case.world_size)
    try:
        arrays = function(case, rank, dist.group.WORLD)
        save_file({name: array.contiguous() for name, array in arrays.items()}, f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def _forward_and_backward(case: Case, rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    ids, grad_output = case.batch_array("ids"), case.part_of(case.batch_array("grad_output"), rank)
    if case.reduction == "all_to_all":  # each rank its own
        ids = case.part_of(ids, rank)
    upstream = to_torch(grad_output)
    emb = ParallelVocabEmbedding.from_table(
        case.weights,
        case.tensor,
        rank,
        case.world_size,
        group,
        vocab_size=case.vocab_size,
        **case.config.changes(),
    )
    output = emb(to_torch(ids))
    output.backward(upstream)
    assert emb.weight.grad is not None
    return output.detach(), emb.weight.grad


def to_torch(array: np.ndarray) -> Tensor:
    """Tensor that shares an array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Array that shares a tensor's memory."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


if __name__ == "__main__":
    serve("torch", {"torch": torch.__version__}, run)
