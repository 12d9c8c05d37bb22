"""Records: a backend's results for one case, in one file."""

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import save_file

from shared.bits import DTYPES, unsigned_view
from shared.proof.case import Case, CaseFacts, sha256
from shared.tables.tensor_file import open_safetensors

__all__ = ["VERSIONS", "Record", "RecordWriter", "Rows", "is_record", "replacing", "writable_file"]

VERSIONS = {"python": platform.python_version(), "numpy": np.__version__}
"""Versions of what every backend runs on."""

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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path``; links are followed."""
    target = writable_file(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Rows:
    """Rows with any nonzero bit, of an array ``[total, e]``.

    Attributes:
        index: row numbers, ascending, int64 ``[k]``.
        values: the rows, ``[k, e]``.
        total: number of all rows.
    """

    index: np.ndarray
    values: np.ndarray
    total: int

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """Nonzero rows of an array ``[..., e]``, its leading dimensions flattened.

        Example:
            >>> import numpy as np
            >>> from shared.proof.record import Rows
            >>> Rows.of(np.array([[0.0, 0.0], [0.0, 5.0], [-0.0, 0.0]])).index
            array([1, 2])
        """
        flat = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        index = np.flatnonzero(unsigned_view(flat).any(axis=1))
        return cls(index, flat[index], len(flat))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows numbered ``index``, zero rows included."""
        found = np.zeros((len(index), self.values.shape[1]), self.values.dtype)
        if len(self.index):
            slot = np.minimum(np.searchsorted(self.index, index), len(self.index) - 1)
            present = self.index[slot] == index
            found[present] = self.values[slot[present]]
        return found


class RecordWriter:
    """Collects a backend's arrays and writes them to a safetensors file.

    The file holds the nonzero rows (``.index``, ``.values``) of ``forward.R`` and ``gradient.R`` for each rank R, and of
    ``sum``. It also holds the case's ids and row hashes. Its metadata hold sizes, versions, and SHA-256 checksums of the
    case's inputs and of every tensor.
    """

    def __init__(self, case: Case, backend: str, versions: dict[str, str]) -> None:
        self._case, self._tensors = case, dict[str, np.ndarray]()
        self._versions = VERSIONS | versions
        self._header = {"backend": backend, "machine": platform.machine(), **case.facts}

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array: ``forward.R``, ``gradient.R`` (R a rank) or ``sum``."""
        rows = Rows.of(array)
        self._tensors[f"{name}.index"], self._tensors[f"{name}.values"] = rows.index, rows.values

    def write(self, path: Path) -> None:
        """Write the file atomically; a symbolic link is followed."""
        tensors = {**self._tensors, **{name: self._case.batch_array(name) for name in ("ids", "row_hashes")}}
        if missing := _tensor_names(self._case.world_size) - set(tensors):
            raise ValueError(f"the record lacks {', '.join(sorted(missing))}")
        sums = {name: sha256(array) for name, array in tensors.items()}
        header = {**self._header, "versions": self._versions, "sha256": sums}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "header": json.dumps(header)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)


def _tensor_names(world_size: int) -> set[str]:
    arrays = [*(f"{what}.{rank}" for what in ("forward", "gradient") for rank in range(world_size)), "sum"]
    return {"ids", "row_hashes", *(f"{name}.{part}" for name in arrays for part in ("index", "values"))}


@dataclass(frozen=True)
class Record(CaseFacts):
    """A record file with a validated header; tensors are read on demand."""

    path: Path
    backend: str
    versions: dict[str, str]
    machine: str
    sha256: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> Self:
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
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: a damaged record, its header does not hold together ({error})") from error
        return record

    def _check_header(self, names: set[str]) -> None:
        texts = [self.backend, self.machine, self.source]
        texts += [text for facts in (self.versions, self.checksums, self.sha256) for text in facts.values()]
        valid = {
            "dtype": self.dtype in DTYPES,
            "ids_shape": all(type(size) is int and size >= 0 for size in self.ids_shape),
            "seed": type(self.seed) is int,
            "text": all(isinstance(text, str) for text in texts),
            "number of tensors": len(names) >= self.world_size,  # a hostile world_size would make the next set huge
        }
        for name, holds in valid.items():
            if not holds:
                raise ValueError(f"invalid {name}")
        _ = self.output_shape  # raises ValueError for a sequence that cannot be split
        if not _tensor_names(self.world_size) == names == set(self.sha256):
            raise ValueError("tensors and checksums do not match")
        if self.sha256["ids"] != self.checksums.get("ids"):
            raise ValueError("ids are not those of the case")

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

    def same_case(self, other: Self) -> None:
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
