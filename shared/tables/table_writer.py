"""Writing the rows of a table to their files, reading them back, and converting a table from one layout to another."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared.agreement import disagreement
from shared.bits import STORED_DTYPES, cast
from shared.partition import VocabPartition
from shared.tables.layouts import Layout, TableSpec, layout_named, new_set_id
from shared.tables.row_checks import block_rows, piece_edges
from shared.tables.table_file import TableFile
from shared.tables.tensor_file import read_exactly, write_exactly

__all__ = ["Exchange", "Fill", "convert_table", "write_ranks", "write_together"]

Fill = Callable[[int, int, memoryview], int | None]
"""Puts the bytes of rows ``[start, stop)`` into a buffer; returns their CRC-32 where it knows it."""

Exchange = Callable[[Any], list[Any]]
"""Gives every process what each of them passed, in their order; of what JSON can hold."""

_PIECES_PER_TASK = 256


def write_ranks(
    layout: Layout, ranks: Sequence[int], fill: Fill, progress: Callable[[int], None] = lambda rows: None
) -> list[list[int]]:
    """Write the rows that some ranks own, and read them back; returns the checksums of each rank's pieces.

    Several processes can write ranks of one layout, once one of them has made its files.

    Args:
        layout: where they go.
        ranks: whose rows.
        fill: where they come from; called in several threads at once.
        progress: called with how many rows were written.

    Raises:
        ValueError: what is read back is not what was written.
    """
    spec, sums, tasks = layout.spec, [], []
    # Twice as many as processors: some wait for the disk.
    with ThreadPoolExecutor(min(8, 2 * len(os.sched_getaffinity(0)))) as pool:
        for index, rank in enumerate(ranks):
            edges = piece_edges(spec.partition.owned_range(rank), block_rows(spec.row_bytes))
            pieces = [(int(start), int(stop)) for start, stop in pairwise(edges)]
            sums.append([0] * len(pieces))
            for first in range(0, len(pieces), _PIECES_PER_TASK):
                part = pieces[first : first + _PIECES_PER_TASK]
                tasks.append((index, first, part, pool.submit(_copy, layout, rank, fill, part)))
        try:
            for index, first, part, task in tasks:
                sums[index][first : first + len(part)] = task.result()
                progress(part[-1][1] - part[0][0])
            list(pool.map(lambda index: _seal(layout, ranks[index], sums[index]), range(len(ranks))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sums


def _copy(layout: Layout, rank: int, fill: Fill, pieces: Sequence[tuple[int, int]]) -> list[int]:
    """Write pieces, read them back and return their checksums."""
    place, row_bytes = layout.place(rank), layout.spec.row_bytes
    offset = len(layout.header(rank)) - place.start * row_bytes
    buffers: dict[int, tuple[bytearray, bytearray]] = {}
    sums = []
    with open(place.path, "rb+", buffering=0) as file:
        for start, stop in pieces:
            size, at = (stop - start) * row_bytes, offset + start * row_bytes
            if size not in buffers:
                buffers[size] = bytearray(size), bytearray(size)
            data, again = buffers[size]
            known = fill(start, stop, memoryview(data))
            write_exactly(file.fileno(), memoryview(data), at)
            read_exactly(file.fileno(), memoryview(again), at, place.path)
            if data != again:
                raise ValueError(f"{place.path}: rows {start} to {stop - 1} of the table are not there as written")
            sums.append(zlib.crc32(data) if known is None else known)
        # The disk begins on it while the rest is written, or the wait at the end would double the time.
        first, last = (offset + row * row_bytes for row in (pieces[0][0], pieces[-1][1]))
        os.posix_fadvise(file.fileno(), first, last - first, os.POSIX_FADV_DONTNEED)
    return sums


def _seal(layout: Layout, rank: int, sums: Sequence[int]) -> None:
    """Have a rank's rows reach the disk, and its header too where it has one of its own."""
    with open(layout.place(rank).path, "rb+", buffering=0) as file:
        if layout.sums_belong_to_ranks():
            write_exactly(file.fileno(), layout.header(rank, sums), 0)
        os.fsync(file.fileno())


def convert_table(
    table: TableFile,
    target: Path,
    layout: str,
    partition: VocabPartition,
    *,
    tensor: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Path]:
    """Write a table anew: other files, another number of ranks, another dtype; in bounded memory.

    The target is there whole or not at all, whenever the process ends; every row is read back after it was written.

    Args:
        table: where the rows come from.
        target: the file, or the folder of files.
        layout: ``"file"``, ``"shards"`` or ``"megatron"``.
        partition: who is to own what.
        tensor: what to call the tensor; None leaves its name.
        dtype: the name of the dtype to cast to; None leaves it.
        force: replace what is there.
        progress: called with how many rows were written.

    Returns:
        The files.

    Raises:
        ValueError: the target exists, cannot be written, or the table is damaged.

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> from safetensors.numpy import save_file
        >>> from shared import VocabPartition
        >>> from shared.tables.find_table import open_table
        >>> from shared.tables.table_writer import convert_table
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"wte.weight": np.arange(10.0).reshape(5, 2)}, folder / "model.safetensors")
        >>> partition = VocabPartition(5, 3, "even")
        >>> files = convert_table(open_table(folder), folder / "shards", "shards", partition)
        >>> open_table(folder / "shards").rows(1, 3)
        array([[2., 3.],
               [4., 5.]])
    """
    dtype = _stored_dtype(table.dtype if dtype is None else dtype)
    if partition.vocab_size != table.vocab_size:
        raise ValueError(
            f"partition must be of the table's {table.vocab_size} rows, got one of vocab_size={partition.vocab_size}"
        )
    spec = TableSpec(
        Path(target),
        tensor or table.tensor,
        dtype,
        table.emb_size,
        partition,
        new_set_id(),
    )
    stored = STORED_DTYPES[dtype]

    def fill(start: int, stop: int, buffer: memoryview) -> int | None:
        if dtype == table.dtype:
            return table.read_into(start, stop, buffer)
        rows = cast(table.rows(start, stop), stored)
        buffer[:] = rows.reshape(-1).view("u1").data
        return None

    writing = layout_named(layout, spec)
    try:
        writing.prepare(force)
        return writing.finish(write_ranks(writing, range(partition.world_size), fill, progress))
    except BaseException:
        writing.abort()
        raise


def _stored_dtype(name: str) -> str:
    if name not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {name!r}")
    return name


def write_together(
    path: str | Path,
    tensor: str,
    dtype: str,
    emb_size: int,
    partition: VocabPartition,
    ranks: Sequence[int],
    fill: Fill,
    *,
    force: bool,
    process: int = 0,
    exchange: Exchange = lambda mine: [mine],
) -> None:
    """Write a table whose rows several processes have, each its own; every process calls this with the same arguments.

    Args:
        path: a file, if it ends in ``.safetensors``; else the folder of a set of shards. All processes must see it.
        tensor, dtype, emb_size, partition: of the table.
        ranks: those whose rows this process writes.
        fill: where they come from.
        force: replace what is there.
        process: the number of this process; the first one makes the files and names them in the end.
        exchange: how processes tell each other what they did; left out, there is one.

    Raises:
        ValueError: in every process, if any of them could not do its part, or they were asked for different things.
    """
    sizes = partition.vocab_size, emb_size, partition.world_size, partition.padded_vocab_size
    _stored_dtype(dtype)
    facts = {"path": str(path), "tensor_name": tensor, "dtype": dtype, "sizes": str(sizes), "force": str(force)}
    everyones = exchange({"facts": facts, "set_id": new_set_id()})
    found = disagreement([each["facts"] for each in everyones])
    if found is not None:
        raise ValueError(found)
    spec = TableSpec(Path(path), tensor, dtype, emb_size, partition, everyones[0]["set_id"])
    layout = layout_named("file" if spec.target.suffix == ".safetensors" else "shards", spec)
    sums: list[list[int]] = [[] for _ in range(partition.world_size)]

    def prepare() -> None:
        if process == 0:
            layout.prepare(force)

    def write() -> list[tuple[int, list[int]]]:
        return list(zip(ranks, write_ranks(layout, ranks, fill), strict=True))

    def finish() -> None:
        if process == 0:
            layout.finish(sums)

    try:
        _in_step(prepare, exchange)
        for written in _in_step(write, exchange):
            for rank, part in written:
                sums[rank] = part
        _in_step(finish, exchange)
    except BaseException:
        if process == 0:
            layout.abort()
        raise


def _in_step(work: Callable[[], Any], exchange: Exchange) -> list[Any]:
    """What each process's work returned; an error everywhere, if there was one anywhere."""
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    everyones = exchange([None if failure is None else str(failure), result])
    if failure is not None:
        raise failure
    for number, (problem, _) in enumerate(everyones):
        if problem is not None:
            raise ValueError(f"process {number} could not write its part: {problem}")
    return [result for _, result in everyones]
