"""Atomic writes of a table, by one or many processes."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.agreement import disagreement
from shared.bits import STORED_DTYPES, cast
from shared.partition import VocabPartition
from shared.tables.find_table import PICKLE_SUFFIXES, open_table
from shared.tables.table_file import TableFile, TableSpec
from shared.tables.tensor_file import header_bytes

__all__ = ["Exchange", "convert_table", "write_table"]

Rows = Callable[[int, int], np.ndarray]
"""Returns rows ``[start, stop)`` of the table, ``[stop - start, e]``, in the dtype to be stored."""

Exchange = Callable[[Any], list[Any]]
"""Gathers a JSON value from every process, in process order."""

Progress = Callable[[int], None]
"""Called with the number of rows just written."""

_PIECE_BYTES = 1 << 24
_PART = "model.safetensors"


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
    try:
        with _in_every_process(exchange):
            if process == 0:
                _check_target(path, target, force)
                _create(temporary, spec)
        with _in_every_process(exchange):
            _fill(temporary, spec, 0, ranges, rows, progress)
        with _in_every_process(exchange):
            if process == 0:
                _rename(temporary, target, path, force)
    finally:
        if process == 0:
            temporary.unlink(missing_ok=True)
    return path


def convert_table(
    table: TableFile,
    target: str | Path,
    partition: VocabPartition | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda count: None,
) -> list[Path]:
    """Copy a table to one file or Megatron-style parts, in bounded memory.

    Without ``partition``, ``target`` is a file; ``force`` replaces an existing one. With it, ``target`` is a folder to
    create of ``mp_rank_00/model.safetensors`` and so on, one part per rank, padding rows zero. A folder that is not empty
    is never replaced. ``dtype`` casts the table, rounding once.

    Returns:
        The files written.

    Raises:
        ValueError: the target exists or cannot be written, the partition has another ``vocab_size``, or the source is
            damaged.
    """
    spec = TableSpec(table.tensor, dtype or table.dtype, table.vocab_size, table.emb_size)

    def rows(start: int, stop: int) -> np.ndarray:
        return cast(table.rows(start, stop), STORED_DTYPES[spec.dtype])

    if partition is None:
        return [write_table(target, spec, [(0, spec.vocab_size)], rows, force=force, progress=progress)]
    if partition.vocab_size != table.vocab_size:
        raise ValueError(
            f"partition must be of the table's {table.vocab_size} rows, got one of vocab_size={partition.vocab_size}"
        )
    return _write_parts(Path(target), spec, partition, rows, progress)


def _write_parts(
    folder: Path, spec: TableSpec, partition: VocabPartition, rows: Rows, progress: Progress
) -> list[Path]:
    """Write one file per rank into a temporary folder, and rename that."""
    _check_parent(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(_not_new(folder))
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    names = [f"mp_rank_{rank:02d}" for rank in range(partition.world_size)]
    try:
        temporary.mkdir()
        for rank, name in enumerate(names):
            path = temporary / name / _PART
            path.parent.mkdir()
            _create(path, replace(spec, vocab_size=partition.rows_per_rank))
            _fill(path, spec, partition.start(rank), [partition.owned_range(rank)], rows, progress)
            _sync_folder(path.parent)
        _sync_folder(temporary)
        try:
            os.rename(temporary, folder)
        except OSError as error:  # another process has made a file or filled the folder meanwhile
            raise ValueError(_not_new(folder)) from error
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [folder / name / _PART for name in names]


def _create(path: Path, spec: TableSpec) -> None:
    header = header_bytes(spec.tensor, spec.dtype, (spec.vocab_size, spec.emb_size), {"format": "pt"})
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(len(header) + spec.vocab_size * spec.row_bytes)


def _fill(
    path: Path, spec: TableSpec, first_row: int, ranges: Iterable[tuple[int, int]], rows: Rows, progress: Progress
) -> None:
    """Write ranges of rows, read them back and sync them.

    ``first_row`` is the first one that the file has.
    """
    written = open_table(path, spec.tensor)
    pieces = (piece for start, stop in ranges for piece in spec.pieces(start, stop, _PIECE_BYTES))
    with open(path, "rb+") as file:
        for start, stop in pieces:
            data = np.ascontiguousarray(rows(start, stop)).view(np.uint8)
            file.seek(written.segments[0].offset + (start - first_row) * spec.row_bytes)
            file.write(data.data)
            file.flush()
            if not np.array_equal(data, written.rows(start - first_row, stop - first_row).view(np.uint8)):
                raise ValueError(f"{path}: rows {start} to {stop - 1} of the table are not there as written")
            progress(stop - start)
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


def _not_new(folder: Path) -> str:
    return f"{folder}: exists; parts are written to a new folder: choose another name or remove it first"


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


@contextlib.contextmanager
def _in_every_process(exchange: Exchange) -> Iterator[None]:
    """Raise in every process if the step failed in one."""
    failure: Exception | None = None
    try:
        yield
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
