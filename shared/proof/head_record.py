"""Results of a backend's head for one case, in one file."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from shared.proof.head_case import HeadCase
from shared.tables.tensor_file import open_safetensors

__all__ = ["ARRAYS", "HeadRecord", "HeadWriter"]

ARRAYS = ("loss", "logprobs", "hidden gradient", "table gradient", "argmax")
"""Results of every rank; all but the gradient of its own rows are the same on all ranks."""


class HeadWriter:
    """Collects the ranks' arrays and writes them to a safetensors file."""

    def __init__(self, case: HeadCase, backend: str, versions: dict[str, str]) -> None:
        self._names = {f"{what}.{rank}" for what in ARRAYS for rank in range(case.world_size)}
        self._versions = {"python": platform.python_version(), "numpy": np.__version__, **versions}
        self._backend = backend
        self._tensors: dict[str, np.ndarray] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array: ``WHAT.R``, for one of ``ARRAYS`` and a rank."""
        self._tensors[name] = np.array(array, order="C")

    def write(self, path: Path) -> None:
        """Write the file; ValueError if arrays are missing."""
        if missing := self._names - set(self._tensors):
            raise ValueError(f"the record lacks {', '.join(sorted(missing))}")
        save_file(self._tensors, path, {"backend": self._backend, "versions": json.dumps(self._versions)})


@dataclass(frozen=True)
class HeadRecord:
    """A file of ``HeadWriter``; arrays are read on demand."""

    path: Path
    backend: str
    versions: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> HeadRecord:
        """Open a file that this program has just had written."""
        with open_safetensors(path) as file:
            metadata = file.metadata()
        return cls(path, metadata["backend"], json.loads(metadata["versions"]))

    def array(self, what: str, rank: int) -> np.ndarray:
        """Read one array of a rank."""
        with open_safetensors(self.path) as file:
            return np.asarray(file.get_tensor(f"{what}.{rank}"))
