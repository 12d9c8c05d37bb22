"""The manifest of a table that is kept as one file a rank: which files belong together, and who has which rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.bits import STORED_DTYPES
from shared.partition import VocabPartition
from shared.tables.strict_json import check_integer, load_object

__all__ = ["MANIFEST_NAME", "Manifest", "Shard", "is_set_name", "is_shard_name", "shard_name"]

MANIFEST_NAME = "manifest.json"
"""The name of the manifest in the folder of its shards."""

_SET_ID = "[0-9a-f]{16}"
_FORMAT = "parallel-vocab-embedding shards"
_VERSION = 1


def shard_name(rank: int, world_size: int, set_id: str) -> str:
    """The name of one rank's file: with the set's id, so that a new set never writes over an old one's files."""
    return f"rank-{rank:05d}-of-{world_size:05d}.{set_id}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether a file of that name was written as a shard."""
    return re.fullmatch(rf"rank-\d{{5,}}-of-\d{{5,}}\.{_SET_ID}\.safetensors", name) is not None


def is_set_name(name: str) -> bool:
    """Whether a file of that name was written with a set, finished or not: a shard, or a manifest on its way."""
    return is_shard_name(name) or re.fullmatch(rf"{re.escape(MANIFEST_NAME)}\.{_SET_ID}\.tmp", name) is not None


@dataclass(frozen=True)
class Shard:
    """One rank's file.

    Attributes:
        file: its name, in the manifest's folder.
        start, stop: the rows in it.
        bytes: the file's size.
        crc32: the checksum of what the file says of itself, the checksums of its rows included.
    """

    file: str
    start: int
    stop: int
    bytes: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """A set of shards.

    Attributes:
        tensor, dtype, vocab_size, emb_size: the table's.
        world_size, padded_vocab_size: how it is split over ranks; rows of padding are in no file.
        set_id: the same in all files that were written together.
        shards: one a rank, in their order.
    """

    tensor: str
    dtype: str
    vocab_size: int
    emb_size: int
    world_size: int
    padded_vocab_size: int
    set_id: str
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        for name in ("vocab_size", "emb_size", "world_size", "padded_vocab_size"):
            check_integer(name, getattr(self, name), at_least=1)
        partition = self.partition
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype {self.dtype!r}")
        if not isinstance(self.tensor, str) or not isinstance(self.set_id, str):
            raise TypeError("tensor or set_id is no text")
        if not re.fullmatch(_SET_ID, self.set_id):
            raise ValueError(f"set_id must be 16 hexadecimal digits, got {self.set_id[:40]!r}")
        if len(self.shards) != partition.world_size:
            raise ValueError(f"{len(self.shards)} shards for {partition.world_size} ranks")
        for rank, shard in enumerate(self.shards):
            expected = shard_name(rank, partition.world_size, self.set_id)
            if shard.file != expected or Path(expected).name != expected:
                raise ValueError(f"the shard of rank {rank} must be the file {expected!r}, got {shard.file!r}")
            for name in ("start", "stop", "bytes"):
                check_integer(f"{name} of the shard of rank {rank}", getattr(shard, name))
            if (shard.start, shard.stop) != partition.owned_range(rank):
                raise ValueError(
                    f"the shard of rank {rank} must hold rows {list(partition.owned_range(rank))}, "
                    f"got {[shard.start, shard.stop]}"
                )
            if not isinstance(shard.crc32, str):
                raise TypeError(f"the checksum of the shard of rank {rank} is no text")

    @property
    def partition(self) -> VocabPartition:
        """Who owns what."""
        return VocabPartition(self.vocab_size, self.world_size, self.padded_vocab_size)

    def as_json(self) -> str:
        """The document."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            ValueError: there is none, or it does not hold together.
        """
        stored: dict[str, Any] = load_object(path)
        try:
            check_integer("version", stored.get("version"))
            if (stored.pop("format", None), stored.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError(f"not {_FORMAT!r} of version {_VERSION}")
            check_integer("world_size", stored.get("world_size"), at_least=1)
            if len(stored["shards"]) != stored["world_size"]:
                raise ValueError("not one shard for each rank")
            shards = tuple(Shard(**shard) for shard in stored.pop("shards"))
            return cls(**stored, shards=shards)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a damaged or foreign manifest ({error})") from error
