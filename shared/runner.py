"""The oracle as a backend: the whole case in NumPy, rank by rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shared.case import Case
from shared.harness import serve
from shared.oracle import partial_lookup, sum_partials, weight_grad
from shared.record import RecordWriter

__all__ = ["run"]


def run(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record every rank's ``Er`` and gradient, and the sum, as NumPy computes them."""
    ids, grad_output = case.batch_array("ids"), case.batch_array("grad_output")
    total: np.ndarray | None = None
    for rank in range(case.world_size):
        progress(f"rank {rank}", rank, case.world_size)
        partial = partial_lookup(case.rank_rows(rank), ids, case.partition, rank)
        total = partial if total is None else sum_partials([total, partial])
        record.add(f"forward.{rank}", partial)
        record.add(f"gradient.{rank}", weight_grad(grad_output, ids, case.partition, rank, case.padding_idx))
    assert total is not None
    record.add("sum", total)


if __name__ == "__main__":
    serve("oracle", {}, run)
