"""Results of a backend's head for one case, in one file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from shared.proof.record import RecordWriter
from shared.tables.tensor_file import open_safetensors

__all__ = ["ARRAYS", "HeadRecord", "HeadWriter"]

ARRAYS = ("loss", "logprobs", "hidden gradient", "table gradient", "argmax")
"""Results of every rank; all but the gradient of its own rows are the same on all ranks."""


class HeadWriter(RecordWriter):
    """Collects the ranks' arrays and writes them to a safetensors file."""

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array: ``WHAT.R``, for one of ``ARRAYS`` and a rank."""
        self._tensors[name] = np.array(array, order="C")

    def write(self, path: Path) -> None:
        """Write the file, which only the process that asked for it reads."""
        save_file(self._tensors, path, self._versions)


@dataclass(frozen=True)
class HeadRecord:
    """A file of ``HeadWriter``."""

    path: Path

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries, by name."""
        with open_safetensors(self.path) as file:
            return dict(file.metadata())

    def array(self, name: str) -> np.ndarray:
        """Read an array."""
        with open_safetensors(self.path) as file:
            return np.asarray(file.get_tensor(name))
