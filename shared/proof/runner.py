"""The oracle as a backend: a case in NumPy, rank by rank."""

import numpy as np

from shared.proof.case import Case, Progress
from shared.proof.launch import serve
from shared.proof.oracle import partial_lookup, weight_grad
from shared.proof.record import RecordWriter

__all__ = ["run"]


def run(case: Case, record: RecordWriter, progress: Progress) -> None:
    """Record every rank's result and gradient, and the whole embedding."""
    ids, grad_output = case.batch_array("ids"), case.batch_array("grad_output")
    total = np.zeros_like(grad_output)
    for rank in range(case.world_size):
        progress(f"rank {rank}", rank, case.world_size)
        partial = partial_lookup(case.rank_rows(rank), ids, case.partition, rank)
        if case.reduction == "none":
            record.add(f"forward.{rank}", partial)
            with np.errstate(invalid="ignore"):  # signalling NaN
                total = partial if rank == 0 else total + partial
        else:  # a reduction copies rows: -0.0 stays -0.0
            owned = case.partition.owns(ids, rank)
            total[owned] = partial[owned]
        record.add(f"gradient.{rank}", weight_grad(grad_output, ids, case.partition, rank, case.padding_idx))
    if case.reduction != "none":
        for rank in range(case.world_size):
            record.add(f"forward.{rank}", case.part_of(total, rank))
    record.add("sum", total)


if __name__ == "__main__":
    serve("oracle", {}, run)
