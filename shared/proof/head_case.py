"""Inputs of a comparison of heads, and a backend's results, in files."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from shared.bits import DTYPES
from shared.global_normal import normal_rows
from shared.proof.case import Case, CaseOptions, Progress, find_inputs
from shared.proof.generate import normal_chunks
from shared.proof.record import RecordWriter
from shared.tables.tensor_file import open_safetensors

__all__ = ["ARRAYS", "IGNORE_INDEX", "HeadCase", "HeadRecord", "HeadWriter", "build_head_case"]

ARRAYS = ("loss", "logprobs", "hidden gradient", "table gradient", "argmax")
"""Results of every rank; all but the gradient of its own rows are the same on all ranks."""

IGNORE_INDEX = -100
"""Target of a token without a next one; as every target outside the vocabulary, it gives no loss."""


@dataclass(frozen=True)
class HeadCase(Case):
    """A case of the head on disk.

    Its batch holds ``targets``, int64, and if ``tied`` the ``ids`` whose rows of the table are the hidden states, else
    ``hidden`` ``[*targets.shape, e]``.
    """

    tied: bool

    @property
    def facts(self) -> dict[str, Any]:
        """Facts and options, by name, as plain values."""
        return {**super().facts, "tied": self.tied}

    def hidden_states(self) -> np.ndarray:
        """Hidden states ``[*targets.shape, e]`` in the table's dtype.

        Those of ids outside the vocabulary are zeros.
        """
        if not self.tied:
            return self.batch_array("hidden")
        ids = self.batch_array("ids")
        hidden, valid = np.zeros((*ids.shape, self.emb_size), DTYPES[self.dtype]), self.partition.is_valid(ids)
        hidden[valid] = self.table.rows(0, self.vocab_size)[ids[valid]]
        return hidden


def build_head_case(options: CaseOptions, tied: bool, folder: Path, progress: Progress = lambda *_: None) -> HeadCase:
    """Write the files of a case of the head to ``folder``.

    The ids are the targets, and hidden states are normally distributed. If tied, the ids are looked up, and each token's
    target is the id that follows it in row-major order.

    Raises:
        ValueError, TypeError, IndexError: an option is out of range, a file is invalid, or options contradict each other.
    """
    if tied:
        options = replace(options, reduction="all_reduce")
    table, ids, config, source = find_inputs(options, folder, (32768, 256), normal_chunks, (4, 128), progress)
    if table.dtype == "float64":
        raise ValueError(
            "--dtype must be given for a head over a table of float64, to cast it: its argmax takes no float64"
        )
    progress("hidden states and checksums", 0, 1)
    if tied:
        targets = np.append(ids.reshape(-1)[1:], IGNORE_INDEX)[: ids.size].reshape(ids.shape)
        batch = {"ids": ids, "targets": targets}
    else:  # rows of the same seed behind those of a generated table
        first, dtype = table.vocab_size, DTYPES[table.dtype]
        hidden = normal_rows(first, first + math.prod(ids.shape), table.emb_size, dtype, options.seed)
        batch = {"targets": ids, "hidden": hidden.reshape(*ids.shape, table.emb_size)}
    return HeadCase.write(
        folder, table, batch, config=config, ids_shape=ids.shape, source=source, seed=options.seed, tied=tied
    )


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
