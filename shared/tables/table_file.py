"""A vocabulary table in files: read any range of rows without the others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.bits import STORED_DTYPES, cast, row_hashes
from shared.partition import VocabPartition
from shared.tables.tensor_file import read_exactly

__all__ = ["Segment", "TableFile"]

_ALIGNMENT = 64
_CAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a table in one file.

    Attributes:
        path: the file.
        offset: the byte at which row ``start`` begins.
        start, stop: the half-open range of rows.
    """

    path: Path
    offset: int
    start: int
    stop: int


class TableFile:
    """A table in files, whose rows are read on demand. ``shared.tables.find_table.open_table`` opens one.

    Attributes:
        path: the path that was opened.
        tensor: the tensor's name.
        dtype: the name of the stored dtype.
        vocab_size, emb_size: its shape, without padding.
        partition: how Megatron-style parts split it; None for one file.
        files: the files, those without rows included.
    """

    def __init__(
        self,
        path: Path,
        tensor: str,
        dtype: str,
        emb_size: int,
        segments: Sequence[Segment],
        partition: VocabPartition | None = None,
    ) -> None:
        self.path, self.tensor, self.dtype, self.emb_size, self.partition = path, tensor, dtype, emb_size, partition
        self.files = [segment.path for segment in segments]
        self._segments = [segment for segment in segments if segment.start < segment.stop]
        self.vocab_size = self._segments[-1].stop

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows ``[start, stop)`` in the stored dtype, and no others.

        Raises:
            IndexError: the range leaves the table.
            ValueError: a file cannot be read or is truncated.
        """
        self._check_range(start, stop)
        rows = np.empty((stop - start, self.emb_size), STORED_DTYPES[self.dtype])
        self._read_into(start, rows)
        return rows

    def read_rows(self, start: int, out: np.ndarray) -> None:
        """Read the rows from ``start`` on into ``out``, ``[rows, e]``, cast to its dtype.

        Rows of the stored dtype are read in place; others pass through one mebibyte of memory.

        Raises:
            IndexError: the range leaves the table.
            ValueError: ``out`` has another width or is not C-contiguous; a file cannot be read or is truncated.
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
        for segment in self._segments:
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
        """Yield all rows in order, a chunk at a time."""
        step = max(1, (megabytes << 20) // self.row_bytes)
        for start in range(0, self.vocab_size, step):
            yield self.rows(start, min(start + step, self.vocab_size))

    def fingerprint(self) -> tuple[str, np.ndarray]:
        """Return the SHA-256 of the tensor's bytes and a hash of each row, uint64 ``[v]``."""
        digest, hashes = hashlib.sha256(), []
        for chunk in self.chunks():
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
            hashes.append(row_hashes(chunk))
        return digest.hexdigest(), np.concatenate(hashes)

    def padded_rows(self, partition: VocabPartition, rank: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Read the rows of ``rank``, ``[n, e]``, cast to ``dtype``; padding rows are zero."""
        start, stop = partition.owned_range(rank)
        size = partition.rows_per_rank * self.emb_size * dtype.itemsize
        # Aligned, so that a framework can adopt the memory without a copy.
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        rows = memory[first : first + size].view(dtype).reshape(partition.rows_per_rank, self.emb_size)
        self.read_rows(start, rows[: stop - start])
        return rows


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    """Open a file that is still a regular one; opening a pipe in its place would block."""
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
