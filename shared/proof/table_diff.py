"""Comparison of two tables in files, in bounded memory per row."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from shared.bits import STORED_DTYPES, canonical_nan, row_hashes, unsigned_view
from shared.checks import check_size
from shared.partition import VocabPartition
from shared.proof.case import Progress
from shared.proof.classify import Differing, Reference
from shared.proof.comparison import Comparison, combined, describe
from shared.proof.report import Report
from shared.tables.table_file import TableFile

__all__ = ["compare_tables"]

_BATCH = 1 << 21
"""Elements of each table in memory at a time; classifying them takes about eight int64 per element."""


@np.errstate(invalid="ignore")  # signalling NaN
def compare_tables(
    left: TableFile,
    right: TableFile,
    vocab_size: int | None = None,
    world_size: int | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Compare the rows of two tables bit by bit.

    If dtypes differ, the wider one is rounded once to the narrower. Padding is reported but not compared.

    Args:
        left, right: the tables, opened with their padding.
        vocab_size: rows to compare; later rows are padding. None: all rows. Then rows that only the taller table has are
            padding if they are zero or repeat one row, and missing from the other table otherwise.
        world_size: ranks that rows are attributed to. None: the number of parts of the files, or one.
        progress: called with the step, the rows done and the rows in all.

    Raises:
        ValueError: the columns differ in number, a table has fewer rows than ``vocab_size``, or a file is damaged.
    """
    pair = _Pair(left, right, vocab_size, world_size)
    return pair.report(pair.compare(progress))


class _Pair:
    """Two tables, read in one dtype."""

    def __init__(self, left: TableFile, right: TableFile, vocab_size: int | None, world_size: int | None) -> None:
        self.tables, self.names = (left, right), _names(left, right)
        named = dict(zip(self.names, self.tables, strict=True))
        if left.emb_size != right.emb_size:
            sizes = ", ".join(f"{name} has {table.emb_size} columns" for name, table in named.items())
            raise ValueError(f"tables must have the same number of columns to be compared: {sizes}")
        heights = [table.vocab_size for table in self.tables]
        self.shorter = min(heights)
        least = self.shorter if vocab_size is None else check_size("vocab_size", vocab_size)
        for name, table in named.items():
            if least > table.vocab_size:
                raise ValueError(f"vocab_size must be at most the {table.vocab_size} rows that {name} has, got {least}")
        self.padding = [_padding(table, least) for table in self.tables]
        self.vocab_size = least
        if vocab_size is None and "other values" in self.padding:
            self.padding, self.vocab_size = ["none", "none"], max(heights)
        self.dtypes = [STORED_DTYPES[table.dtype] for table in self.tables]
        self.dtype = min(self.dtypes, key=lambda dtype: (dtype.itemsize, int(ml_dtypes.finfo(dtype).nmant)))
        self.partition = self._partition(world_size)

    def _partition(self, world_size: int | None) -> VocabPartition:
        stored = next((table.partition for table in self.tables if table.partition is not None), None)
        if world_size is None and stored is not None and stored.padded_vocab_size >= self.vocab_size:
            return VocabPartition(self.vocab_size, stored.world_size, stored.padded_vocab_size)
        return VocabPartition(self.vocab_size, 1 if world_size is None else world_size, "even")

    def _rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[start, stop)`` of both tables; zeros beyond the end of one."""
        found = []
        for table in self.tables:
            rows = np.zeros((stop - start, table.emb_size), self.dtype)
            if start < table.vocab_size:
                table.read_rows(start, rows[: table.vocab_size - start])
            found.append(rows if self.dtypes[0] == self.dtypes[1] else canonical_nan(rows))
        return found[0], found[1]

    def compare(self, progress: Progress) -> list[Comparison]:
        """Compare the rows of each rank, then all rows."""
        hashes, differs = np.zeros((2, self.vocab_size), np.uint64), np.ones(self.vocab_size, bool)
        for start, stop in _batches(self.tables[0], 0, self.vocab_size):
            progress("reading", start, self.vocab_size)
            left, right = self._rows(start, stop)
            hashes[:, start:stop] = row_hashes(left), row_hashes(right)
            differs[start:stop] = (unsigned_view(left) != unsigned_view(right)).any(axis=1)
        differs[self.shorter :] = True
        references = Reference(hashes[1]), Reference(hashes[0])
        results = []
        for rank in range(self.partition.world_size):
            parts = []
            for start, stop in _batches(self.tables[0], *self.partition.owned_range(rank)):
                nonzero = int((hashes[0, start:stop] != 0).sum())
                part = Comparison(*self.names, "table", rank, stop - start, nonzero)
                ids = start + np.flatnonzero(differs[start:stop])
                if len(ids):
                    progress("describing", start, self.vocab_size)
                    left, right = (rows[ids - start] for rows in self._rows(start, stop))
                    kinds = np.where(ids >= self.shorter, "row missing", "").astype(object)
                    rows = Differing(ids, ids[:, None], (left, right), references, np.ones(len(ids), bool), kinds)
                    part = describe(part, rows, self.partition)
                parts.append(part)
            results.append(combined(self.names, "table", rank, parts))
        whole = combined(self.names, "table", None, results)
        return [*results, whole] if len(results) > 1 else [whole]

    def report(self, comparisons: list[Comparison]) -> Report:
        """Report on the tables, given the result of ``compare``."""
        tables: list[dict[str, Any]] = []
        notes = []
        for name, table, padding in zip(self.names, self.tables, self.padding, strict=True):
            more = table.vocab_size - self.vocab_size
            facts = {"name": name, "path": str(table.path), "tensor": table.tensor, "dtype": table.dtype}
            tables.append({**facts, "rows": table.vocab_size, "padding_rows": max(0, more), "padding": padding})
            if table.dtype != self.dtype.name:
                notes.append(f"{name}: {table.dtype} rounded to {self.dtype.name} to be compared")
            if more > 0:
                notes.append(f"{name}: {more} rows of padding ({padding}), not compared")
            if more < 0:
                notes.append(f"{name}: lacks the last {-more} rows, which are not padding in the other table")
        sizes = {
            "vocab_size": self.vocab_size,
            "emb_size": self.tables[0].emb_size,
            "world_size": self.partition.world_size,
            "compared_as": self.dtype.name,
        }
        ranks = f" over {self.partition.world_size} ranks" if self.partition.world_size > 1 else ""
        return Report(
            title=f"{self.vocab_size} x {self.tables[0].emb_size} {self.dtype.name}{ranks}",
            notes=tuple(notes),
            sides={
                facts["name"]: {fact: str(facts[fact]) for fact in ("path", "tensor", "dtype", "rows")}
                for facts in tables
            },
            partition=self.partition,
            arrays={"table": "not zero"},
            comparisons=comparisons,
            facts={"tables": tables, **sizes},
        )


def _batches(table: TableFile, start: int, stop: int) -> Iterator[tuple[int, int]]:
    return table.pieces(start, stop, _BATCH * STORED_DTYPES[table.dtype].itemsize)


def _names(left: TableFile, right: TableFile) -> tuple[str, str]:
    """Names for two tables: differing parts of their paths, else the tensors."""
    parts = [list(table.path.parts) for table in (left, right)]
    for end in (-1, 0):
        while min(map(len, parts)) > 1 and parts[0][end] == parts[1][end]:
            for each in parts:
                each.pop(end)
    choices = ("/".join(parts[0]), "/".join(parts[1])), (left.tensor, right.tensor), ("A", "B")
    return next(names for names in choices if names[0] != names[1])


def _padding(table: TableFile, start: int) -> str:
    """Describe the values of rows from ``start`` on."""
    if start >= table.vocab_size:
        return "none"
    first = unsigned_view(table.rows(start, start + 1))
    if any((unsigned_view(table.rows(*batch)) != first).any() for batch in _batches(table, start, table.vocab_size)):
        return "other values"
    if not first.any():
        return "zeros"
    return "one row repeated" if table.vocab_size - start > 1 else "other values"  # one row may be a token's
