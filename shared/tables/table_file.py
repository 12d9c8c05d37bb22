"""Vocabulary tables in files, read by ranges of rows."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.bits import STORED_DTYPES, cast, row_hashes
from shared.partition import VocabPartition

__all__ = ["Segment", "TableFile", "TableSpec"]

_ALIGNMENT = 64
_CAST_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class TableSpec:
    """Tensor name, stored dtype and unpadded shape of a table."""

    tensor: str
    dtype: str
    vocab_size: int
    emb_size: int

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}")

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize

    def pieces(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Split a range of rows into pieces of at most ``size`` bytes."""
        step = max(1, size // self.row_bytes)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, stop)`` of a table, at byte ``offset`` of a file."""

    path: Path
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class TableFile(TableSpec):
    """A table in files, read on demand; made by ``open_table``.

    ``path`` is what was opened. ``segments`` are the rows in order, some of them empty. ``partition`` is the split into
    Megatron-style parts; None for one file.
    """

    path: Path
    segments: Sequence[Segment]
    partition: VocabPartition | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows ``[start, stop)``, and only these, in the stored dtype.

        Raises:
            IndexError: the range leaves the table.
            ValueError: a file cannot be read or is truncated.
        """
        self._check_range(start, stop)
        rows = np.empty((stop - start, self.emb_size), STORED_DTYPES[self.dtype])
        self.read_rows(start, rows)
        return rows

    def read_rows(self, start: int, out: np.ndarray) -> None:
        """Read rows from ``start`` on into ``out``, cast to its dtype.

        Rows of the stored dtype are read in place; others pass through a buffer of 1 MiB. Errors are those of ``rows``,
        and ValueError where ``out`` has another width or is not C-contiguous.
        """
        if out.ndim != 2 or out.shape[1] != self.emb_size or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous [rows, {self.emb_size}], got {list(out.shape)}")
        stop = start + len(out)
        self._check_range(start, stop)
        if out.dtype != STORED_DTYPES[self.dtype]:
            for first, last in self.pieces(start, stop, _CAST_BYTES):
                out[first - start : last - start] = cast(self.rows(first, last), out.dtype)
            return
        buffer, width = out.reshape(-1).view(np.uint8).data, self.row_bytes
        for segment in self.segments:
            first, last = max(start, segment.start), min(stop, segment.stop)
            if first < last:
                part = buffer[(first - start) * width : (last - start) * width]
                _read(segment.path, segment.offset + (first - segment.start) * width, part)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.vocab_size:
            raise IndexError(f"rows [{start}, {stop}) leave the table's [0, {self.vocab_size})")

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, in chunks of 64 MiB."""
        for start, stop in self.pieces(0, self.vocab_size, _CHUNK_BYTES):
            yield self.rows(start, stop)

    def fingerprint(self) -> tuple[str, np.ndarray]:
        """SHA-256 of the tensor's bytes, and a hash of each row."""
        digest, hashes = hashlib.sha256(), []
        for chunk in self.chunks():
            digest.update(chunk.view(np.uint8).data)
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


def _read(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill the buffer from byte ``offset`` of a file."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            file.seek(offset)
            missing = len(buffer) - file.readinto(buffer)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if missing:
        raise ValueError(f"{path}: truncated, it ends {missing} bytes early")


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file; without blocking if a pipe has replaced it."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a file any more")
    return descriptor
