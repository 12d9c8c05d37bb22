"""The ways in which a vocabulary table is laid out in files, each so that a new table is there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.bits import STORED_DTYPES
from shared.checks import check_choice
from shared.partition import VocabPartition
from shared.tables.exchange_names import exchange
from shared.tables.find_table import PICKLE_SUFFIXES, open_shards, open_table
from shared.tables.manifest import MANIFEST_NAME, Manifest, Shard, is_set_name, shard_name
from shared.tables.row_checks import FileFacts, block_rows, piece_edges
from shared.tables.tensor_file import header_bytes, write_exactly

__all__ = ["LAYOUTS", "Layout", "Place", "TableSpec", "layout_named", "new_set_id"]

_MEGATRON_FILE = "model.safetensors"


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

    def hidden(self) -> Path:
        """A name beside the target that nothing else has."""
        return self.target.with_name(f".{self.target.name}.{self.set_id}.tmp")

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

    _force = False
    _lock: int | None = None

    def __init__(self, spec: TableSpec) -> None:
        # A link stays a link: what it leads to is replaced. A folder called "." has another name too.
        target, nameless = spec.target, spec.target.name in ("", "..")
        self._named = target
        self.spec = replace(spec, target=target.resolve() if nameless or target.is_symlink() else target)

    @abstractmethod
    def place(self, rank: int) -> Place:
        """Where the rows of a rank go."""

    @abstractmethod
    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        """How the file of a rank begins; without the checksums, something of the same length."""

    @abstractmethod
    def check_target(self) -> None:
        """Refuse a target that may not be written, or not without ``force``."""

    @abstractmethod
    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        """Put the new table in the place of the old one; returns its files."""

    @abstractmethod
    def abort(self) -> None:
        """Take back what was made; what was there before is untouched, and so is what was finished."""

    def prepare(self, force: bool) -> None:
        """Check the target, and make the files, as large as they will be.

        Raises:
            ValueError: the target may not be written, or not without ``force``.
        """
        self._force = force
        self.check_target()
        self.make_files()

    def make_files(self) -> None:
        """Make the files."""
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
            raise ValueError(f"{self._named}: its folder does not exist")

    def _check_taken(self, taken: bool) -> None:
        if taken and not self._force:
            raise ValueError(f"{self._named}: exists; pass --force (force=True) to replace it")

    def _check_folder(self, foreign: Sequence[str], taken: bool) -> None:
        target = self.spec.target
        if target.exists() and not target.is_dir():
            raise ValueError(f"{self._named}: exists and is not a folder; name another one")
        if foreign:
            raise ValueError(f"{self._named}: holds other files ({', '.join(foreign[:5])}); name a folder of its own")
        self._check_taken(taken)

    def _take(self, path: Path) -> None:
        """Hold a file or folder, so that others see that it is in use; for as long as this process lives."""
        self._lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if _lock(self._lock) is False:
            self._release()
            raise ValueError(f"{path}: another process is writing there; wait for it")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear_leftovers(self) -> None:
        """Remove what a process that was killed left beside the target."""
        name = re.compile(rf"\.{re.escape(self.spec.target.name)}\.[0-9a-f]{{16}}\.tmp(\.old)?")
        for path in [path for path in self.spec.target.parent.iterdir() if name.fullmatch(path.name)]:
            with contextlib.suppress(OSError):  # another user's, or gone by now
                # Of what only has such a name, a pipe is not waited for and a link not followed.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    if _lock(descriptor):
                        _remove(path)
                finally:
                    os.close(descriptor)


class FileLayout(Layout):
    """One safetensors file, as checkpoints have it."""

    def __init__(self, spec: TableSpec) -> None:
        super().__init__(spec)
        ranges = [spec.partition.owned_range(rank) for rank in range(spec.partition.world_size)]
        self._cuts = tuple(sorted({0, *(stop for _, stop in ranges)}))

    def place(self, rank: int) -> Place:
        return Place(self.spec.hidden(), 0, self.spec.partition.vocab_size)

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

    def check_target(self) -> None:
        self._check_parent()
        target = self.spec.target
        if target.suffix in (*PICKLE_SUFFIXES, ".json"):
            raise ValueError(f"{self._named}: its name is not that of a safetensors file; end it in .safetensors")
        if target.exists() and not target.is_file():
            raise ValueError(f"{self._named}: exists and is not a regular file; name another one")
        self._check_taken(target.exists())

    def make_files(self) -> None:
        self._clear_leftovers()
        super().make_files()
        self._take(self.place(0).path)

    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        path = self.place(0).path
        with open(path, "rb+") as file:
            write_exactly(file.fileno(), self.header(0, [number for part in sums for number in part]), 0)
            os.fsync(file.fileno())
        open_table(path, self.spec.tensor)
        self.check_target()  # another process may have been faster
        os.replace(path, self.spec.target)
        _sync_folder(self.spec.target.parent)
        self._release()
        return [self.spec.target]

    def abort(self) -> None:
        _remove(self.place(0).path)
        self._release()


class ShardsLayout(Layout):
    """One file a rank, and a manifest, whose renaming makes the set the one that is there.

    The files' names carry the set's id, so that the old set's files stay as they are until the new manifest is there.
    """

    _made_folder = False

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

    def check_target(self) -> None:
        self._check_parent()
        target = self.spec.target
        names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
        foreign = [name for name in sorted(names) if name != MANIFEST_NAME and not is_set_name(name)]
        # Shards without a manifest are what an interrupted run left.
        self._check_folder(foreign, MANIFEST_NAME in names)

    def make_files(self) -> None:
        target = self.spec.target
        if not target.exists():
            try:
                self._made_folder = True
                target.mkdir()
            except FileExistsError:
                self._made_folder = False  # another process was faster
        self._take(target)
        self.check_target()  # another process may have been faster
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
        with open(self._new_manifest, "x") as file:
            file.write(manifest.as_json())
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(target)
        open_shards(self._new_manifest)
        os.replace(self._new_manifest, target / MANIFEST_NAME)
        _sync_folder(target)
        self._remove_all_but(spec.set_id)
        self._release()
        return [place.path for place in self._places()]

    def abort(self) -> None:
        target = self.spec.target
        with contextlib.suppress(ValueError):
            if self._lock is None or Manifest.load(target / MANIFEST_NAME).set_id == self.spec.set_id:
                self._release()  # it never began, or is finished
                self._remove_folder()
                return
        self._new_manifest.unlink(missing_ok=True)
        for place in self._places():
            place.path.unlink(missing_ok=True)
        self._release()
        self._remove_folder()

    @property
    def _new_manifest(self) -> Path:
        return self.spec.target / f"{MANIFEST_NAME}.{self.spec.set_id}.tmp"

    def _remove_all_but(self, set_id: str) -> None:
        for file in self.spec.target.iterdir():
            if is_set_name(file.name) and set_id not in file.name:
                file.unlink()

    def _remove_folder(self) -> None:
        if self._made_folder and self.spec.target.is_dir() and not any(self.spec.target.iterdir()):
            self.spec.target.rmdir()


class MegatronLayout(Layout):
    """One file a rank, each with equally many rows, the last of them padding: ``mp_rank_00/model.safetensors`` and so on."""

    def place(self, rank: int) -> Place:
        partition = self.spec.partition
        path = self.spec.hidden() / f"mp_rank_{rank:02d}" / _MEGATRON_FILE
        return Place(path, partition.start(rank), partition.rows_per_rank)

    def header(self, rank: int, sums: Sequence[int] | None = None) -> bytes:
        spec = self.spec
        return header_bytes(spec.tensor, spec.dtype, (spec.partition.rows_per_rank, spec.emb_size), {"format": "pt"})

    def check_target(self) -> None:
        self._check_parent()
        target = self.spec.target
        entries = sorted(target.iterdir()) if target.is_dir() else []
        foreign = [entry.name for entry in entries if not (re.fullmatch(r"mp_rank_\d+", entry.name) and entry.is_dir())]
        for entry in entries:
            if entry.name not in foreign:
                inside = sorted(inner.name for inner in entry.iterdir())
                foreign += [f"{entry.name}/{name}" for name in inside if name != _MEGATRON_FILE]
        self._check_folder(foreign, bool(entries))

    def make_files(self) -> None:
        self._clear_leftovers()
        self.spec.hidden().mkdir()
        self._take(self.spec.hidden())
        for place in self._places():
            place.path.parent.mkdir()
        super().make_files()

    def finish(self, sums: Sequence[Sequence[int]]) -> list[Path]:
        spec, new = self.spec, self.spec.hidden()
        for place in self._places():
            _sync_folder(place.path.parent)
        _sync_folder(new)
        open_table([place.path for place in self._places()], spec.tensor, spec.partition.vocab_size)
        self.check_target()  # another process may have been faster
        if spec.target.exists():
            exchange(new, spec.target)
        else:
            os.rename(new, spec.target)
        _sync_folder(spec.target.parent)
        with contextlib.suppress(OSError):  # the old table's; what is left of it, the next run clears
            _remove(new)
        self._release()
        return [spec.target / place.path.relative_to(new) for place in self._places()]

    def abort(self) -> None:
        new, target = self.spec.hidden(), self.spec.target
        _remove(new)  # the new table, or the old one if that is already replaced
        if target.exists():
            _remove(new.with_name(f"{new.name}.old"))
        self._release()


LAYOUTS: dict[str, type[Layout]] = {"file": FileLayout, "shards": ShardsLayout, "megatron": MegatronLayout}
"""By name: one safetensors file; one a rank, with a manifest; one a rank with its padding, as Megatron-LM has it."""


def layout_named(name: str, spec: TableSpec) -> Layout:
    """The layout of that name, of a table."""
    return LAYOUTS[check_choice("layout", name, [*LAYOUTS])](spec)


def new_set_id() -> str:
    """An identifier that no other set of files has."""
    return secrets.token_hex(8)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False where another process has it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
