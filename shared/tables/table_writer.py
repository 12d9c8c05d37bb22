"""Atomic writes of a table, by one or many processes."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.agreement import disagreement
from shared.bits import STORED_DTYPES, cast
from shared.partition import VocabPartition
from shared.tables.find_table import PICKLE_SUFFIXES, open_table
from shared.tables.table_file import TableFile
from shared.tables.tensor_file import header_bytes, read_exactly, write_exactly

__all__ = ["Exchange", "TableSpec", "convert_table", "write_parts", "write_table"]

Rows = Callable[[int, int], np.ndarray]
"""Returns rows ``[start, stop)`` of the table, ``[stop - start, e]``, in the dtype to be stored."""

Exchange = Callable[[Any], list[Any]]
"""Gathers a JSON value from every process, in process order."""

Progress = Callable[[int], None]
"""Called with the number of rows just written."""

_PIECE_BYTES = 1 << 24
_PART = "model.safetensors"


@dataclass(frozen=True)
class TableSpec:
    """Tensor name, stored dtype and unpadded shape of a table to write."""

    tensor: str
    dtype: str
    vocab_size: int
    emb_size: int

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}")

    def header(self, rows: int) -> bytes:
        """First bytes of a file of ``rows`` rows."""
        return header_bytes(self.tensor, self.dtype, (rows, self.emb_size), {"format": "pt"})

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.emb_size * STORED_DTYPES[self.dtype].itemsize


def write_table(
    path: str | Path,
    spec: TableSpec,
    ranges: Iterable[tuple[int, int]],
    rows: Rows,
    *,
    force: bool = False,
    process: int = 0,
    exchange: Exchange = lambda mine: [mine],
    progress: Progress = lambda count: None,
) -> Path:
    """Write one safetensors file, each process its own rows.

    Every process must call it. Rows go to a temporary file beside ``path``. They are read back and synced to the disk
    before the file is renamed. Memory use does not depend on the size of the table.

    Args:
        path: file to write, ending in ``.safetensors``, on a file system shared by all processes.
        spec: the table.
        ranges: half-open ranges of rows that this process writes.
        rows: source of the rows.
        force: replace an existing file.
        process: number of this process; process 0 creates and renames the file.
        exchange: gathers a value from all processes; the default serves a single one.
        progress: called after each piece.

    Raises:
        ValueError: in every process, if one of them failed, they disagree about the table, a row is written by none or by
            two of them, or the file exists and ``force`` is False.
    """
    path, ranges = Path(path), sorted(ranges)
    facts = {"path": str(path), "table": str(spec), "force": str(force)}
    everyones = exchange({"facts": facts, "token": secrets.token_hex(8), "ranges": ranges})
    found = disagreement([each["facts"] for each in everyones], "process", "processes")
    if found is not None:
        raise ValueError(found)
    _check_cover([tuple(each) for mine in everyones for each in mine["ranges"]], spec.vocab_size)
    target = path.resolve() if path.is_symlink() else path  # a link stays a link
    temporary = target.with_name(f".{target.name}.{everyones[0]['token']}.tmp")

    def create() -> None:
        if process == 0:
            _check_target(path, target, force)
            _create(temporary, spec, spec.vocab_size)

    def write() -> None:
        _fill(temporary, spec, range(spec.vocab_size), ranges, rows, progress)

    def rename() -> None:
        if process == 0:
            open_table(temporary, spec.tensor)
            _rename(temporary, target, path, force)

    try:
        for step in (create, write, rename):
            _in_step(step, exchange)
    finally:
        if process == 0:
            temporary.unlink(missing_ok=True)
    return path


def write_parts(
    folder: str | Path, spec: TableSpec, partition: VocabPartition, rows: Rows, progress: Progress = lambda count: None
) -> list[Path]:
    """Write Megatron-style parts: one safetensors file per rank, padding rows zero.

    The parts are ``mp_rank_00/model.safetensors`` and so on, in a temporary folder that is renamed to ``folder`` at the
    end. A folder that is not empty is never replaced.

    Returns:
        The files, in rank order.

    Raises:
        ValueError: the folder exists and is not empty, or it cannot be written.
    """
    folder = Path(folder)
    _check_parent(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    names = [f"mp_rank_{rank:02d}" for rank in range(partition.world_size)]
    try:
        _refuse_full(folder)
        temporary.mkdir()
        for rank, name in enumerate(names):
            path, held = temporary / name / _PART, range(partition.start(rank), partition.stop(rank))
            path.parent.mkdir()
            _create(path, spec, len(held))
            _fill(path, spec, held, [partition.owned_range(rank)], rows, progress)
            _sync_folder(path.parent)
        open_table([temporary / name / _PART for name in names], spec.tensor, spec.vocab_size)
        _refuse_full(folder)  # later than this, rename() itself refuses a folder that is not empty
        _sync_folder(temporary)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name / _PART for name in names]


def convert_table(
    table: TableFile,
    target: str | Path,
    partition: VocabPartition | None = None,
    *,
    tensor: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda count: None,
) -> list[Path]:
    """Copy a table to one file or Megatron-style parts, in bounded memory.

    With ``partition``, ``target`` is a folder to create, with one part per rank; otherwise it is a file. ``tensor`` renames
    the tensor, ``dtype`` casts it, rounding once. ``force`` replaces an existing file.

    Returns:
        The files written.

    Raises:
        ValueError: the target exists or cannot be written, the partition has another ``vocab_size``, or the source is
            damaged.
    """
    spec = TableSpec(tensor or table.tensor, dtype or table.dtype, table.vocab_size, table.emb_size)

    def rows(start: int, stop: int) -> np.ndarray:
        return cast(table.rows(start, stop), STORED_DTYPES[spec.dtype])

    if partition is None:
        return [write_table(target, spec, [(0, spec.vocab_size)], rows, force=force, progress=progress)]
    if partition.vocab_size != table.vocab_size:
        raise ValueError(
            f"partition must be of the table's {table.vocab_size} rows, got one of vocab_size={partition.vocab_size}"
        )
    return write_parts(target, spec, partition, rows, progress)


def _create(path: Path, spec: TableSpec, count: int) -> None:
    header = spec.header(count)
    with open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), len(header) + count * spec.row_bytes)
        write_exactly(file.fileno(), header, 0)


def _fill(
    path: Path, spec: TableSpec, held: range, ranges: Iterable[tuple[int, int]], rows: Rows, progress: Progress
) -> None:
    """Write ranges of a file's rows, read them back, and sync them."""
    step, offset = max(1, _PIECE_BYTES // spec.row_bytes), len(spec.header(len(held)))
    pieces = ((first, min(first + step, stop)) for start, stop in ranges for first in range(start, stop, step))
    with open(path, "rb+", buffering=0) as file:
        for first, last in pieces:
            data = np.ascontiguousarray(rows(first, last)).view(np.uint8).reshape(-1)
            again, at = np.empty_like(data), offset + (first - held.start) * spec.row_bytes
            write_exactly(file.fileno(), data.data, at)
            read_exactly(file.fileno(), again.data, at, path)
            if not np.array_equal(data, again):
                raise ValueError(f"{path}: rows {first} to {last - 1} of the table are not there as written")
            progress(last - first)
        os.fsync(file.fileno())


def _check_parent(path: Path) -> None:
    if path.name in ("", ".."):
        raise ValueError(f"{path}: give the file or folder a name of its own")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; create it first")


def _check_target(path: Path, target: Path, force: bool) -> None:
    _check_parent(target)
    if target.suffix != ".safetensors" or path.suffix in (*PICKLE_SUFFIXES, ".json"):
        raise ValueError(f"{path}: a table is written to one safetensors file; end its name in .safetensors")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path}: exists and is not a regular file; choose another name")
    if target.exists() and not force:
        raise ValueError(_exists(path))


def _exists(path: Path) -> str:
    return f"{path}: exists; pass --force (force=True) to replace it"


def _refuse_full(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{folder}: exists; parts are written to a new folder: choose another name or remove it first")


def _rename(temporary: Path, target: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(temporary, target)
    else:
        try:
            os.link(temporary, target)  # unlike rename(), fails if another process has created the file meanwhile
        except FileExistsError as error:
            raise ValueError(_exists(path)) from error
        except OSError:  # a file system without hard links
            os.replace(temporary, target)
    _sync_folder(target.parent)


def _check_cover(ranges: Sequence[tuple[int, int]], vocab_size: int) -> None:
    row = 0
    for start, stop in [*sorted(each for each in ranges if each[0] < each[1]), (vocab_size, vocab_size)]:
        if start > row:
            raise ValueError(f"rows [{row}, {start}) belong to no process: every rank must take part")
        if start < row:
            raise ValueError(f"rows [{start}, {row}) belong to more than one process")
        row = stop


def _in_step(work: Callable[[], None], exchange: Exchange) -> None:
    """Do the work; raise in every process if it failed in one."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    problems = exchange(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, problem in enumerate(problems):
        if problem is not None:
            raise ValueError(f"process {number} could not write its part: {problem}")


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
