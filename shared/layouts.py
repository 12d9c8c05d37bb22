"""The ways in which a vocabulary table is laid out in files, each so that a new table is there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.bits import STORED_DTYPES
from shared.checks import check_choice
from shared.find_table import open_shards, open_table
from shared.manifest import MANIFEST_NAME, Manifest, Shard, is_set_name, shard_name
from shared.partition import VocabPartition
from shared.row_checks import FileFacts, block_rows, piece_edges
from shared.tensor_file import header_bytes, write_exactly

__all__ = ["LAYOUTS", "Layout", "Place", "TableSpec", "layout_named"]


@dataclass(frozen=True)
class TableSpec:
    """A table that is to be written.

    Attributes:
        target: the file, or the folder of files.
        tensor: the tensor's name.
        dtype: the name of the dtype to store.
        emb_size: columns.
        partition: who owns what; of a single file, who writes what.
        set_id: the same in all processes that write, and in no other set.
    """

    target: Path
    tensor: str
    dtype: str
    emb_size: int
    partition: VocabPartition
    set_id: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize

    def hidden(self, suffix: str) -> Path:
        """A name beside the target that nothing else has."""
        return self.target.with_name(f".{self.target.name}.{self.set_id}.{suffix}")

    def facts(self, partition: VocabPartition, cuts: tuple[int, ...], sums: Sequence[int]) -> FileFacts:
        """What a file with the rows between the cuts says of itself."""
        sizes = partition.vocab_size, self.emb_size, partition.world_size, partition.padded_vocab_size
        return FileFacts(self.tensor, self.dtype, *sizes, cuts, block_rows(self.row_bytes), tuple(sums), self.set_id)


@dataclass(frozen=True)
class Place:
    """A file while it is written.

    Attributes:
        path: its name.
        start: the row of the table that it begins with.
        rows: rows in it.
    """

    path: Path
    start: int
    rows: int


class Layout(ABC):
    """One table on its way to the disk.

    Until ``finish`` renames one file or folder, whatever was at the target is untouched; from then on the new table is
    there.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec

    @abstractmethod
    def place(self, rank: int) -> Place:
        """Where the rows of a rank go."""

    @abstractmethod
    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        """How the file of a rank begins; without the checksums, something of the same length."""

    @abstractmethod
    def check_target(self, force: bool) -> None:
        """Refuse a target that may not be written, or not without ``force``."""

    @abstractmethod
    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        """Put the new table in the place of the old one; returns its files."""

    def abort(self) -> None:
        """Take back what was made; what was there before is untouched."""
        for place in self._places():
            place.path.unlink(missing_ok=True)

    def make_files(self) -> None:
        """Make the files, as large as they will be."""
        for rank, place in enumerate(self._places()):
            descriptor = os.open(place.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, len(self.header(rank)) + place.rows * self.spec.row_bytes)
            finally:
                os.close(descriptor)

    def sums_belong_to_ranks(self) -> bool:
        """Whether each rank's file says its own checksums; else one file says all of them, when it is finished."""
        return True

    def _places(self) -> list[Place]:
        return [self.place(rank) for rank in range(self.spec.partition.world_size)]

    def _check_parent(self) -> None:
        if not self.spec.target.parent.is_dir():
            raise ValueError(f"{self.spec.target}: its folder does not exist")

    def _check_folder(self, may_hold: str, force: bool, taken: bool) -> None:
        target = self.spec.target
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target}: exists and is not a folder; name another one")
        if may_hold:
            raise ValueError(f"{target}: holds other files ({may_hold}); name a folder of its own")
        if taken and not force:
            raise ValueError(f"{target}: exists; pass --force (force=True) to replace it")


class FileLayout(Layout):
    """One safetensors file, as checkpoints have it."""

    def __init__(self, spec: TableSpec) -> None:
        super().__init__(spec)
        ranges = [spec.partition.owned_range(rank) for rank in range(spec.partition.world_size)]
        self._cuts = tuple(sorted({0, *(stop for _, stop in ranges)}))

    def place(self, rank: int) -> Place:
        return Place(self.spec.hidden("tmp"), 0, self.spec.partition.vocab_size)

    def _places(self) -> list[Place]:
        return [self.place(0)]

    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        spec, whole = self.spec, VocabPartition(self.spec.partition.vocab_size, 1)
        if sums is None:
            sums = [0] * (len(piece_edges(self._cuts, block_rows(spec.row_bytes))) - 1)
        metadata = {"format": "pt", **spec.facts(whole, self._cuts, sums).as_metadata()}
        return header_bytes(spec.tensor, spec.dtype, (whole.vocab_size, spec.emb_size), metadata)

    def sums_belong_to_ranks(self) -> bool:
        return False

    def check_target(self, force: bool) -> None:
        self._check_parent()
        target = self.spec.target
        if target.exists() and not target.is_file():
            raise ValueError(f"{target}: exists and is not a regular file; name another one")
        if target.exists() and not force:
            raise ValueError(f"{target}: exists; pass --force (force=True) to replace it")

    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        path, target = self.place(0).path, self.spec.target.resolve()  # a link stays one
        with open(path, "rb+") as file:
            write_exactly(file.fileno(), self.header(0, [number for part in sums for number in part]), 0)
            os.fsync(file.fileno())
        open_table(path, self.spec.tensor)
        os.replace(path, target)
        _sync_folder(target.parent)
        return [self.spec.target]


class ShardsLayout(Layout):
    """One file a rank, and a manifest, whose renaming makes the set the one that is there.

    The files' names carry the set's id, so that the old set's files stay as they are until the new manifest is there.
    """

    _lock: int | None = None

    def place(self, rank: int) -> Place:
        start, stop = self.spec.partition.owned_range(rank)
        name = shard_name(rank, self.spec.partition.world_size, self.spec.set_id)
        return Place(self.spec.target / name, start, stop - start)

    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        spec, cuts = self.spec, self.spec.partition.owned_range(rank)
        if sums is None:
            sums = [0] * (len(piece_edges(cuts, block_rows(spec.row_bytes))) - 1)
        metadata = {"format": "pt", **spec.facts(spec.partition, cuts, sums).as_metadata()}
        return header_bytes(spec.tensor, spec.dtype, (cuts[1] - cuts[0], spec.emb_size), metadata)

    def check_target(self, force: bool) -> None:
        self._check_parent()
        target = self.spec.target
        names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
        foreign = [name for name in sorted(names) if name != MANIFEST_NAME and not is_set_name(name)]
        # Shards without a manifest are what an interrupted run left.
        self._check_folder(", ".join(foreign[:5]), force, MANIFEST_NAME in names)

    def make_files(self) -> None:
        target = self.spec.target
        target.mkdir(exist_ok=True)
        self._lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise ValueError(f"{target}: another process is writing there; wait for it") from None
        super().make_files()

    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        spec, partition, target = self.spec, self.spec.partition, self.spec.target
        shards = []
        for rank, (place, part) in enumerate(zip(self._places(), sums, strict=True)):
            checksum = spec.facts(partition, partition.owned_range(rank), part).checksum
            size = place.path.stat().st_size
            shards.append(Shard(place.path.name, place.start, place.start + place.rows, size, checksum))
        sizes = partition.vocab_size, spec.emb_size, partition.world_size, partition.padded_vocab_size
        manifest = Manifest(spec.tensor, spec.dtype, *sizes, spec.set_id, tuple(shards))
        temporary = target / f"{MANIFEST_NAME}.{spec.set_id}.tmp"
        try:
            with open(temporary, "x") as file:
                file.write(manifest.as_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(target)
            open_shards(temporary)
            os.replace(temporary, target / MANIFEST_NAME)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target)
        kept = {place.path for place in self._places()}
        for file_of_old in target.iterdir():
            if is_set_name(file_of_old.name) and file_of_old not in kept:
                file_of_old.unlink()
        self._unlock()
        return [place.path for place in self._places()]

    def abort(self) -> None:
        if self._lock is None:
            return
        super().abort()
        self._unlock()
        if not any(self.spec.target.iterdir()):
            self.spec.target.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class MegatronLayout(Layout):
    """One file a rank, each with equally many rows, the last of them padding: ``mp_rank_00/model.safetensors`` and so on."""

    def place(self, rank: int) -> Place:
        partition = self.spec.partition
        path = self.spec.hidden("tmp") / f"mp_rank_{rank:02d}" / "model.safetensors"
        return Place(path, partition.start(rank), partition.rows_per_rank)

    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        spec = self.spec
        return header_bytes(spec.tensor, spec.dtype, (spec.partition.rows_per_rank, spec.emb_size), {"format": "pt"})

    def check_target(self, force: bool) -> None:
        self._check_parent()
        target = self.spec.target
        names = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
        foreign = [name for name in names if not name.startswith("mp_rank_")]
        self._check_folder(", ".join(foreign[:5]), force, bool(names))

    def make_files(self) -> None:
        for place in self._places():
            place.path.parent.mkdir(parents=True)
        super().make_files()

    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        spec, new, old = self.spec, self.spec.hidden("tmp"), self.spec.hidden("old")
        for place in self._places():
            _sync_folder(place.path.parent)
        _sync_folder(new)
        open_table([place.path for place in self._places()], spec.tensor, spec.partition.vocab_size)
        if spec.target.exists():
            os.rename(spec.target, old)
        os.rename(new, spec.target)
        _sync_folder(spec.target.parent)
        shutil.rmtree(old, ignore_errors=True)
        return [spec.target / place.path.relative_to(new) for place in self._places()]

    def abort(self) -> None:
        shutil.rmtree(self.spec.hidden("tmp"), ignore_errors=True)


LAYOUTS: dict[str, type[Layout]] = {"file": FileLayout, "shards": ShardsLayout, "megatron": MegatronLayout}
"""By name: one safetensors file; one a rank, with a manifest; one a rank with its padding, as Megatron-LM has it."""


def layout_named(name: str, spec: TableSpec) -> Layout:
    """The layout of that name, of a table."""
    return LAYOUTS[check_choice("layout", name, [*LAYOUTS])](spec)


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
