"""Vocabulary tables in files, read by ranges of rows."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.bits import STORED_DTYPES, cast, row_hashes
from shared.partition import VocabPartition
from shared.tables.tensor_file import read_exactly

__all__ = ["Segment", "TableFile"]

_ALIGNMENT = 64
_CAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, stop)`` of a table, at byte ``offset`` of a file."""

    path: Path
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class TableFile:
    """A table in files, read on demand; made by ``open_table``.

    ``segments`` are its rows in order, ``partition`` the split into Megatron-style parts; None for one file.
    """

    path: Path
    tensor: str
    dtype: str
    emb_size: int
    segments: Sequence[Segment]
    partition: VocabPartition | None = None

    @property
    def files(self) -> list[Path]:
        """Files that hold rows other than padding."""
        return [segment.path for segment in self.segments]

    @property
    def vocab_size(self) -> int:
        """Rows, padding excluded."""
        return self.segments[-1].stop

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows ``[start, stop)``, and only these, in the stored dtype.

        Raises:
            IndexError: the range leaves the table.
            ValueError: a file cannot be read or is truncated.
        """
        self._check_range(start, stop)
        rows = np.empty((stop - start, self.emb_size), STORED_DTYPES[self.dtype])
        self._read_into(start, rows)
        return rows

    def read_rows(self, start: int, out: np.ndarray) -> None:
        """Read rows from ``start`` on into ``out``, cast to its dtype.

        Rows of the stored dtype are read in place; others pass through a buffer of 1 MiB. Errors are those of ``rows``,
        and ValueError where ``out`` has another width or is not C-contiguous.
        """
        if out.ndim != 2 or out.shape[1] != self.emb_size or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous [rows, {self.emb_size}], got {list(out.shape)}")
        self._check_range(start, start + len(out))
        if out.dtype == STORED_DTYPES[self.dtype]:
            self._read_into(start, out)
            return
        step = max(1, _CAST_BYTES // self.row_bytes)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            part[...] = cast(self.rows(start + first, start + first + len(part)), out.dtype)

    def _read_into(self, start: int, out: np.ndarray) -> None:
        buffer, width, stop = out.reshape(-1).view(np.uint8).data, self.row_bytes, start + len(out)
        for segment in self.segments:
            first, last = max(start, segment.start), min(stop, segment.stop)
            if first >= last:
                continue
            part = buffer[(first - start) * width : (last - start) * width]
            with _open_regular(segment.path) as descriptor:
                read_exactly(descriptor, part, segment.offset + (first - segment.start) * width, segment.path)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.vocab_size:
            raise IndexError(f"rows [{start}, {stop}) leave the table's [0, {self.vocab_size})")

    def chunks(self, megabytes: int = 64) -> Iterator[np.ndarray]:
        """Yield all rows in order, in chunks."""
        step = max(1, (megabytes << 20) // self.row_bytes)
        for start in range(0, self.vocab_size, step):
            yield self.rows(start, min(start + step, self.vocab_size))

    def fingerprint(self) -> tuple[str, np.ndarray]:
        """SHA-256 of the tensor's bytes, and a hash of each row."""
        digest, hashes = hashlib.sha256(), []
        for chunk in self.chunks():
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
            hashes.append(row_hashes(chunk))
        return digest.hexdigest(), np.concatenate(hashes)

    def padded_rows(self, partition: VocabPartition, rank: int, dtype: np.dtype) -> np.ndarray:
        """Read the rows of ``rank``, cast; padding rows are zero."""
        start, stop = partition.owned_range(rank)
        size = partition.rows_per_rank * self.emb_size * dtype.itemsize
        # 64-byte aligned: frameworks then use the memory without a copy.
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        rows = memory[first : first + size].view(dtype).reshape(partition.rows_per_rank, self.emb_size)
        self.read_rows(start, rows[: stop - start])
        return rows


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    """Open a regular file; without blocking if a pipe has replaced it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: not a file any more")
        yield descriptor
    finally:
        os.close(descriptor)
