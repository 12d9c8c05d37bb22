"""Results of a backend's head for one case, in one file."""

from dataclasses import dataclass

import numpy as np

from shared.proof.record import Record, RecordWriter

__all__ = ["ARRAYS", "HeadRecord", "HeadWriter"]

ARRAYS = ("loss", "logprobs", "hidden gradient", "table gradient", "argmax")
"""Results of every rank; all but the gradient of its own rows are the same on all ranks."""


class HeadWriter(RecordWriter):
    """Collects the ranks' arrays and writes them to a safetensors file."""

    inputs = ()

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array: ``WHAT.R``, for one of ``ARRAYS`` and a rank."""
        self._tensors[name] = np.array(array, order="C")

    @staticmethod
    def tensors(world_size: int) -> set[str]:
        """Names of all arrays."""
        return {f"{what}.{rank}" for what in ARRAYS for rank in range(world_size)}


@dataclass(frozen=True)
class HeadRecord(Record):
    """A file of ``HeadWriter``."""

    tied: bool

    writer = HeadWriter
