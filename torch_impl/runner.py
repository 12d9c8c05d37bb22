"""The PyTorch layer on a case: one module per rank, in turn, each given only its own rows."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from shared.case import Case
from shared.harness import serve
from shared.record import RecordWriter
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["run"]


def run(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record every rank's ``Er`` and gradient, and the sum."""
    ids, grad_output = _tensor(case.batch_array("ids")), _tensor(case.batch_array("grad_output"))
    total: Tensor | None = None
    for rank in range(case.world_size):
        progress(f"rank {rank}", rank, case.world_size)
        emb = ParallelVocabEmbedding(
            case.vocab_size,
            case.emb_size,
            rank,
            case.world_size,
            dtype=grad_output.dtype,
            device="meta",
            padding_idx=case.padding_idx,
        )
        emb.load_state_dict({"weight": _tensor(case.rank_rows(rank))}, assign=True)
        partial = emb(ids)
        partial.backward(grad_output)
        total = partial.detach() if total is None else total + partial.detach()
        record.add(f"forward.{rank}", _array(partial.detach()))
        assert emb.weight.grad is not None
        record.add(f"gradient.{rank}", _array(emb.weight.grad))
    assert total is not None
    record.add("sum", _array(total))


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
