"""Run the PyTorch head on a case, one process per rank."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from shared.proof.head_case import HeadCase, HeadWriter
from shared.proof.launch import serve
from torch_impl.decode import parallel_argmax
from torch_impl.lm_head import ParallelLMHead
from torch_impl.runner import run_processes, to_torch
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["run"]


def run(case: HeadCase, record: HeadWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record every rank's loss, log-probabilities, gradients and argmax."""
    progress(f"{case.world_size} processes", 0, 2)
    for rank, arrays in enumerate(run_processes(_one_rank, case)):
        for what, array in arrays.items():
            record.add(f"{what}.{rank}", array)


def _one_rank(case: HeadCase, rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    emb = ParallelVocabEmbedding.from_table(
        case.weights, case.tensor, rank, case.world_size, group, vocab_size=case.vocab_size, **case.config.changes()
    )
    head = ParallelLMHead(emb, tied=case.tied, invalid_targets="ignore")
    hidden = (
        emb(to_torch(case.batch_array("ids"))) if case.tied else to_torch(case.batch_array("hidden")).requires_grad_()
    )
    hidden.retain_grad()
    loss, logprobs = head(hidden, to_torch(case.batch_array("targets")), returns=("logprobs",))
    loss.backward()
    with torch.no_grad():
        argmax = parallel_argmax(head(hidden), emb.partition, group)
    assert hidden.grad is not None
    assert emb.weight.grad is not None
    return {
        "loss": loss.detach(),
        "logprobs": logprobs.detach(),
        "hidden gradient": hidden.grad,
        "table gradient": emb.weight.grad,
        "argmax": argmax,
    }


if __name__ == "__main__":
    serve("torch", {"torch": torch.__version__}, run, HeadCase, HeadWriter)
