"""What is measured: tables, ids and the number of ranks."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared import VocabPartition

__all__ = ["FIRST", "Case", "make_ids", "peak_of", "shuffled", "time_and_spread", "timing", "traffic", "warm_pages"]


@dataclass(frozen=True)
class Case:
    """One table and one batch of ids over some ranks.

    Attributes:
        reduction: what the layer returns; ``"accumulate"``: a rank's own rows, and the gradient is added to one that is
            there.
        world_size: ranks.
        ids: how the ids are distributed: ``"uniform"``, or ``"zipf"``, id i with a probability of 1 / (i + 1).
        batch, sequence: the ids' shape.
        vocab_size, emb_size, dtype: the table.
    """

    reduction: str
    world_size: int
    ids: str
    batch: int = 4
    sequence: int = 2048
    vocab_size: int = 131072
    emb_size: int = 1024
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.reduction}, w={self.world_size}, {self.vocab_size} x {self.emb_size} {self.dtype}, "
            f"{self.batch} x {self.sequence} {self.ids} ids"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_ids(case: Case) -> np.ndarray:
    """The ids of a case, int64 ``[batch, sequence]``, the same in every process."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.sequence)
    if case.ids == "uniform":
        return rng.integers(0, case.vocab_size, shape)
    mass = 1 / np.arange(1, case.vocab_size + 1)
    return rng.choice(case.vocab_size, shape, p=mass / mass.sum())


def traffic(case: Case) -> dict[str, float]:
    """Bytes that one rank sends, on average, in a forward: what the exchanges must move.

    ``"dense"`` is a ring's reduce-scatter (twice that for all_reduce): every rank passes all chunks but its own on.
    ``"routed"`` counts each distinct row once for each other rank that needs it.
    """
    w, row = case.world_size, case.emb_size * case.itemsize
    tokens = case.batch * case.sequence
    partition = VocabPartition(case.vocab_size, w)
    ids = make_ids(case)
    if case.reduction == "all_reduce":
        return {"dense": 2 * (w - 1) / w * tokens * row, "routed": (w - 1) / w * len(np.unique(ids)) * row}
    chunks = enumerate(np.split(ids, w, axis=-1))
    foreign = sum(int((partition.owner(np.unique(chunk)) != rank).sum()) for rank, chunk in chunks)
    return {"dense": (w - 1) / w * tokens * row, "routed": foreign / w * row}


def shuffled(count: int, turn: int) -> list[int]:
    """The order of the candidates in a round, the same in every process: who comes after whom changes."""
    return [int(place) for place in np.random.default_rng(turn).permutation(count)]


def timing(kind: str, seconds: Any) -> dict[str, float]:
    """The median of some measurements, and half the distance of their quartiles as a part of it."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {kind: float(median), f"{kind}_spread": float((high - low) / 2 / median)}


def time_and_spread(found: dict[str, float], kind: str) -> str:
    """The same to read."""
    seconds = found[kind]
    value = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
    return f"{value} ±{found.get(f'{kind}_spread', math.nan):.0%}"


FIRST = 2**30
"""So much a process faults in before all else: what a virtual machine's host has not backed yet takes ten times as long."""


def warm_pages(size: int = 2**28) -> None:
    """Fault memory in and free it again: a virtual machine may hand free pages back to its host after a while.

    Without this a candidate's time depends on how much memory the one before it has left warm.
    """
    np.empty(size, np.uint8).fill(1)


def peak_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """Bytes of memory that a call has at most more than there was before it; NaN where Linux does not tell."""
    if device != "cpu":
        import torch

        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    run()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the C library has kept would not count
        reset.write_text("5")
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
        output = run()
        most = int(status.read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, AttributeError):
        return math.nan
    del output
    return 1024.0 * max(0, most - before)
