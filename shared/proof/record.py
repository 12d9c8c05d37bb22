"""Records: a backend's results for one case, in one file."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from shared.bits import DTYPES
from shared.proof.case import Case, CaseFacts, sha256
from shared.proof.rows import Rows
from shared.tables.tensor_file import open_safetensors

__all__ = ["Record", "RecordWriter", "is_record", "writable_file"]

_FORMAT = "parallel-vocab-embedding record"
_VERSION = 5


def writable_file(path: Path) -> Path:
    """Resolve links of a file to write; ValueError if impossible."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"{path}: exists and is not a regular file; name another one")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; create it first")
    return target


class RecordWriter:
    """Collects a backend's arrays and writes them to a safetensors file.

    The file holds the nonzero rows (``.index``, ``.values``) of ``forward.R`` and ``gradient.R`` for each rank R, and of
    ``sum``. It also holds the case's ids and row hashes. Its metadata hold sizes, versions, and SHA-256 checksums of the
    case's inputs and of every tensor.
    """

    def __init__(self, case: Case, backend: str, versions: dict[str, str]) -> None:
        self._case = case
        self._header: dict[str, Any] = {
            "backend": backend,
            "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
            "machine": platform.machine(),
            **case.facts,
        }
        self._tensors = {name: case.batch_array(name) for name in ("ids", "row_hashes")}

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array: ``forward.R``, ``gradient.R`` (R a rank) or ``sum``."""
        rows = Rows.of(array)
        self._tensors[f"{name}.index"], self._tensors[f"{name}.values"] = rows.index, rows.values

    def write(self, path: Path) -> None:
        """Write the file atomically; a symbolic link is followed."""
        path = writable_file(path)
        if missing := _tensors(self._case.world_size) - set(self._tensors):
            raise ValueError(f"the record lacks {', '.join(sorted(missing))}")
        sums = {name: sha256(array) for name, array in self._tensors.items()}
        header = {**self._header, "sha256": sums}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "header": json.dumps(header)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(self._tensors, temporary, metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _tensors(world_size: int) -> set[str]:
    arrays = [*(f"{what}.{rank}" for what in ("forward", "gradient") for rank in range(world_size)), "sum"]
    return {f"{name}.{part}" for name in arrays for part in ("index", "values")}


@dataclass(frozen=True)
class Record(CaseFacts):
    """A record file with a validated header; tensors are read on demand."""

    path: Path
    backend: str
    versions: dict[str, str]
    machine: str
    sha256: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> Record:
        """Open a record; ValueError if missing, damaged or of another version."""
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a record of `pve record`")
        if metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"{path}: a record of version {metadata.get('version')}, this program reads {_VERSION}; record it again"
            )
        try:
            record = cls.from_stored(json.loads(metadata["header"]), path=path)
            record._check_header(names)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: a damaged record, its header does not hold together ({error})") from error
        return record

    def _check_header(self, names: set[str]) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}")
        if not all(type(size) is int and size >= 0 for size in self.ids_shape):
            raise ValueError(f"ids_shape {self.ids_shape}")
        _ = self.output_shape  # raises ValueError for a sequence that cannot be split
        if not all(isinstance(text, str) for text in (self.backend, self.machine, self.source)):
            raise ValueError("backend, machine or source is not text")
        if type(self.seed) is not int:
            raise ValueError(f"seed {self.seed!r}")
        for facts in (self.versions, self.checksums, self.sha256):
            if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
                raise ValueError("versions or checksums are not text")
        if len(names) != 2 * (2 * self.world_size + 1) + 2:  # first: a hostile world_size would make the set below huge
            raise ValueError(f"{len(names)} tensors for {self.world_size} ranks")
        if not {*_tensors(self.world_size), "ids", "row_hashes"} == names == set(self.sha256):
            raise ValueError("tensors and checksums do not match")

    def array(self, name: str) -> np.ndarray:
        """Read a tensor and verify its checksum."""
        with open_safetensors(self.path) as file:
            array = np.asarray(file.get_tensor(name))
        if sha256(array) != self.sha256[name]:
            raise ValueError(f"{self.path}: a damaged record, the checksum of {name} does not match")
        return array

    def rows(self, name: str) -> Rows:
        """Read the rows of ``forward.R``, ``gradient.R`` or ``sum``."""
        if name.startswith("gradient"):
            total = self.partition.rows_per_rank
        else:
            total = math.prod(self.output_shape if name.startswith("forward") else self.ids_shape)
        index, values = self.array(f"{name}.index"), self.array(f"{name}.values")
        if (
            index.dtype != np.int64
            or values.dtype != DTYPES[self.dtype]
            or values.shape != (len(index), self.emb_size)
            or (len(index) and (index[0] < 0 or index[-1] >= total or (np.diff(index) <= 0).any()))
        ):
            raise ValueError(f"{self.path}: a damaged record, {name} does not fit its sizes")
        return Rows(index, values, total)

    def same_case(self, other: Record) -> None:
        """Raise ValueError, naming what differs, unless both records are of one case.

        Exchange and source may differ: results do not depend on them.
        """
        mine, theirs = self.facts, other.facts
        checksums, their_checksums = mine.pop("checksums"), theirs.pop("checksums")
        unlike = [name for name in mine if mine[name] != theirs[name] and name not in ("exchange", "source")]
        differing = [f"{name} {mine[name]} against {name} {theirs[name]}" for name in unlike]
        names = sorted(checksums.keys() | their_checksums.keys())
        inputs = [name for name in names if checksums.get(name) != their_checksums.get(name)]
        if inputs and not differing:
            differing = [f"{' and '.join(inputs)} differ ({self.source} against {other.source})"]
        if differing:
            raise ValueError(f"{self.path} and {other.path} are records of different cases: {', '.join(differing)}")


def is_record(path: Path) -> bool:
    """Whether a safetensors file is a record, of any version."""
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get("format") == _FORMAT
