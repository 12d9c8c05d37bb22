"""Checksums of a table's rows, some rows at a time, so that any part of a table can be checked by reading little more."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shared.partition import VocabPartition
from shared.tables.strict_json import check_integer, parse_object
from shared.tables.tensor_file import Header

__all__ = ["FileFacts", "block_rows", "piece_edges", "read_facts"]

_KEY, _SUM = "pve", "pve.crc32"
_FORMAT = "parallel-vocab-embedding table"
_VERSION = 1
_BLOCK_BYTES = 1 << 18


def block_rows(row_bytes: int) -> int:
    """Rows of a quarter of a mebibyte: what one checksum is of, and what stays in a cache while it is copied."""
    return max(1, _BLOCK_BYTES // row_bytes)


def piece_edges(cuts: Sequence[int], block: int) -> np.ndarray:
    """Where the pieces that have a checksum of their own begin, and where the last ends: at each cut and each block.

    Blocks are counted from row 0 of the table, so that most pieces are the same however a table is cut.

    Example:
        >>> from shared.tables.row_checks import piece_edges
        >>> piece_edges([3, 11], block=4)
        array([ 3,  4,  8, 11])
    """
    first, last = cuts[0], cuts[-1]
    blocks = np.arange(-(-first // block) * block, last, block, dtype=np.int64)
    return np.union1d(blocks, np.asarray(cuts, np.int64))


@dataclass(frozen=True)
class FileFacts:
    """What a table file says of itself, in its metadata.

    Attributes:
        tensor, dtype, vocab_size, emb_size: the table's.
        world_size, padded_vocab_size: how it is split over ranks.
        cuts: the rows at which this file's part begins, was put together, and ends.
        block: rows that one checksum is of.
        crc32: the CRC-32 of each piece of ``piece_edges(cuts, block)``.
        set_id: the same in all files that were written together.
    """

    tensor: str
    dtype: str
    vocab_size: int
    emb_size: int
    world_size: int
    padded_vocab_size: int
    cuts: tuple[int, ...]
    block: int
    crc32: tuple[int, ...]
    set_id: str

    def __post_init__(self) -> None:
        for name in ("vocab_size", "emb_size", "world_size", "padded_vocab_size", "block"):
            check_integer(name, getattr(self, name), at_least=1)
        for number in self.cuts:
            check_integer("a cut", number)
        VocabPartition(self.vocab_size, self.world_size, self.padded_vocab_size)
        ascending = all(a <= b for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        if len(self.cuts) < 2 or not ascending or self.cuts[-1] > self.vocab_size:
            raise ValueError("cuts do not fit the vocabulary")
        if not all(isinstance(text, str) for text in (self.tensor, self.dtype, self.set_id)):
            raise TypeError("tensor, dtype or set_id is no text")

    def as_metadata(self) -> dict[str, str]:
        """The texts that a file carries."""
        sums = "".join(f"{number:08x}" for number in self.crc32)  # of a length that is known before the numbers are
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self), "crc32": sums})
        return {_KEY: text, _SUM: _sum_of(text)}

    @property
    def whole(self) -> bool:
        """Whether the file has all rows of the table."""
        return (self.cuts[0], self.cuts[-1]) == (0, self.vocab_size)

    @property
    def checksum(self) -> str:
        """A checksum of all this, and so of the rows too."""
        return self.as_metadata()[_SUM]


def _sum_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _fours(data: bytes) -> list[bytes]:
    return [data[at : at + 4] for at in range(0, len(data), 4)]


def read_facts(header: Header, source: str) -> FileFacts | None:
    """What the file says of itself, or None where it is a file of someone else's.

    Raises:
        ValueError: it contradicts itself, or the file.
    """
    if _KEY not in header.metadata and _SUM not in header.metadata:
        return None
    try:
        text = header.metadata[_KEY]
        if _sum_of(text) != header.metadata[_SUM]:
            raise ValueError("its own checksum does not match")
        stored: dict[str, Any] = parse_object(text, "metadata")
        check_integer("version", stored["version"])
        if (stored.pop("format"), stored.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"not {_FORMAT!r} of version {_VERSION}")
        sums = tuple(int.from_bytes(four, "big") for four in _fours(bytes.fromhex(stored["crc32"])))
        facts = FileFacts(**{**stored, "cuts": tuple(stored["cuts"]), "crc32": sums})
        place = header.tensors.get(facts.tensor)
        rows = facts.cuts[-1] - facts.cuts[0]
        if place is None or place.dtype != facts.dtype or place.shape != (rows, facts.emb_size):
            raise ValueError(f"the tensor {facts.tensor!r} is not what it says")
        # Before as many numbers are made as there are rows.
        if len(facts.crc32) < rows // facts.block:
            raise ValueError("a checksum is missing")
        if len(facts.crc32) != max(0, len(piece_edges(facts.cuts, facts.block)) - 1):
            raise ValueError("a checksum is missing")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: a damaged table file ({error})") from error
    return facts
