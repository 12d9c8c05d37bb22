"""A vocabulary table in files, of which any rows can be read without the others."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.bits import STORED_DTYPES, cast, row_hashes
from shared.partition import VocabPartition
from shared.tables.row_checks import FileFacts, piece_edges
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
        start, stop: the rows.
        facts: what the file says of itself, its checksums among that; None for a file of someone else's.
    """

    path: Path
    offset: int
    start: int
    stop: int
    facts: FileFacts | None = None


class TableFile:
    """A table in files: its sizes, and its rows on demand. ``shared.tables.find_table.open_table`` makes one of a path.

    Attributes:
        path: what the table was opened as.
        tensor: the tensor's name.
        dtype: the name of the dtype it is stored in.
        vocab_size, emb_size: its shape.
        partition: how it is split over files, where it is.
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
        self._edges = {id(s): piece_edges(s.facts.cuts, s.facts.block) for s in self._segments if s.facts is not None}
        self.vocab_size = self._segments[-1].stop

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` as they are stored; of the rest, nothing is read but what a checksum needs.

        Raises:
            IndexError: the range leaves the table.
            ValueError: a file is truncated, or a checksum does not match.
        """
        self._check_range(start, stop)
        rows = np.empty((stop - start, self.emb_size), STORED_DTYPES[self.dtype])
        self.read_into(start, stop, rows.view(np.uint8).reshape(-1).data)
        return rows

    def read_rows(self, start: int, out: np.ndarray) -> None:
        """Rows from ``start`` on into ``out``, ``[rows, e]``, as many as it has; cast to its dtype.

        Where nothing is to be cast, they are read straight into its memory; else by way of a mebibyte or so.
        """
        if out.ndim != 2 or out.shape[1] != self.emb_size or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous [rows, {self.emb_size}], got {list(out.shape)}")
        self._check_range(start, start + len(out))
        if out.dtype == STORED_DTYPES[self.dtype]:
            self.read_into(start, start + len(out), out.reshape(-1).view(np.uint8).data)
            return
        step = max(1, _CAST_BYTES // self.row_bytes)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            part[...] = cast(self.rows(start + first, start + first + len(part)), out.dtype)

    def read_into(self, start: int, stop: int, buffer: memoryview) -> int | None:
        """The bytes of rows ``[start, stop)`` into ``buffer``; their CRC-32 where they are just what one checksum is of."""
        known, width = None, self.row_bytes
        for segment in self._segments:
            first, last = max(start, segment.start), min(stop, segment.stop)
            if first < last:
                part = buffer[(first - start) * width : (last - start) * width]
                known = self._read_segment(segment, first, last, part)
                if (first, last) != (start, stop):
                    known = None
        return known

    def _read_segment(self, segment: Segment, start: int, stop: int, buffer: memoryview) -> int | None:
        width, known = self.row_bytes, None

        def read(first: int, last: int, into: memoryview) -> None:
            read_exactly(descriptor, into, segment.offset + (first - segment.start) * width, segment.path)

        try:
            # Of a pipe in the file's place no one would wait for the other end.
            descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ValueError(f"{segment.path}: cannot be read ({error.strerror})") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{segment.path}: not a file any more")
            if segment.facts is None:
                read(start, stop, buffer)
                return None
            edges = self._edges[id(segment)]
            for piece in range(int(np.searchsorted(edges, start, "right")) - 1, int(np.searchsorted(edges, stop))):
                first, last = int(edges[piece]), int(edges[piece + 1])
                inside = start <= first and last <= stop
                if inside:
                    part = buffer[(first - start) * width : (last - start) * width]
                else:
                    part = memoryview(bytearray((last - first) * width))
                read(first, last, part)
                known = zlib.crc32(part)
                if known != segment.facts.crc32[piece]:
                    raise ValueError(
                        f"{segment.path}: damaged, the checksum of rows {first} to {last - 1} of the table does not match"
                    )
                if not inside:
                    low, high = max(first, start), min(last, stop)
                    buffer[(low - start) * width : (high - start) * width] = part[
                        (low - first) * width : (high - first) * width
                    ]
                if (first, last) != (start, stop):
                    known = None
            return known
        finally:
            os.close(descriptor)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.vocab_size:
            raise IndexError(f"rows [{start}, {stop}) leave the table's [0, {self.vocab_size})")

    def chunks(self, megabytes: int = 64) -> Iterator[np.ndarray]:
        """All rows in order, some at a time."""
        step = max(1, (megabytes << 20) // self.row_bytes)
        for start in range(0, self.vocab_size, step):
            yield self.rows(start, min(start + step, self.vocab_size))

    def fingerprint(self) -> tuple[str, np.ndarray]:
        """The SHA-256 of the tensor's bytes, and each row's hash, uint64 ``[v]``."""
        digest, hashes = hashlib.sha256(), []
        for chunk in self.chunks():
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
            hashes.append(row_hashes(chunk))
        return digest.hexdigest(), np.concatenate(hashes)

    def padded_rows(self, partition: VocabPartition, rank: int, dtype: np.dtype[Any]) -> np.ndarray:
        """The rows that ``rank`` keeps, ``[n, e]``, cast to ``dtype``; those of padding are zero."""
        start, stop = partition.owned_range(rank)
        size = partition.rows_per_rank * self.emb_size * dtype.itemsize
        # Aligned, so that a framework may take the memory over as it is.
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        rows = memory[first : first + size].view(dtype).reshape(partition.rows_per_rank, self.emb_size)
        self.read_rows(start, rows[: stop - start])
        return rows
