"""Comparison of two tables in files, in bounded memory per row."""

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
    found = pair.differences(pair.fingerprint(progress), progress)
    return pair.report(found)


class _Pair:
    """Two tables, read in one dtype."""

    def __init__(self, left: TableFile, right: TableFile, vocab_size: int | None, world_size: int | None) -> None:
        self.tables, self.names = (left, right), _names(left, right)
        widths = [table.emb_size for table in self.tables]
        if widths[0] != widths[1]:
            sizes = (f"{name} has {width} columns" for name, width in zip(self.names, widths, strict=True))
            raise ValueError(f"tables must have the same number of columns to be compared: {', '.join(sizes)}")
        heights = [table.vocab_size for table in self.tables]
        if vocab_size is not None:
            vocab_size = check_size("vocab_size", vocab_size)
        for name, height in zip(self.names, heights, strict=True):
            if vocab_size is not None and vocab_size > height:
                raise ValueError(f"vocab_size must be at most the {height} rows that {name} has, got {vocab_size}")
        self.shorter = min(heights)
        least = self.shorter if vocab_size is None else vocab_size
        self.padding = [_padding(table, least) for table in self.tables]
        irregular = vocab_size is None and "other values" in self.padding
        self.vocab_size = max(heights) if irregular else least
        if irregular:
            self.padding = ["none", "none"]
        self.dtypes = [STORED_DTYPES[table.dtype] for table in self.tables]
        self.dtype = min(self.dtypes, key=lambda dtype: (dtype.itemsize, int(ml_dtypes.finfo(dtype).nmant)))
        self.partition = self._partition(world_size)
        self.step = max(1, _BATCH // left.emb_size)

    def _partition(self, world_size: int | None) -> VocabPartition:
        stored = next((table.partition for table in self.tables if table.partition is not None), None)
        if world_size is None and stored is not None and stored.padded_vocab_size >= self.vocab_size:
            return VocabPartition(self.vocab_size, stored.world_size, stored.padded_vocab_size)
        return VocabPartition(self.vocab_size, 1 if world_size is None else world_size, "even")

    def rows(self, side: int, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of one table; zeros beyond its end."""
        table = self.tables[side]
        rows = np.zeros((stop - start, table.emb_size), self.dtype)
        if start < table.vocab_size:
            table.read_rows(start, rows[: table.vocab_size - start])
        return rows if self.dtypes[0] == self.dtypes[1] else canonical_nan(rows)

    def fingerprint(self, progress: Progress) -> np.ndarray:
        """Hash rows of both tables; mark differing rows and nonzero left ones."""
        facts = np.zeros(self.vocab_size, [("hash", np.uint64, 2), ("differs", bool), ("nonzero", bool)])
        for start in range(0, self.vocab_size, self.step):
            stop = min(start + self.step, self.vocab_size)
            progress("reading", start, self.vocab_size)
            values = [self.rows(side, start, stop) for side in (0, 1)]
            bits = [unsigned_view(rows) for rows in values]
            facts["hash"][start:stop] = np.stack([row_hashes(rows) for rows in values], axis=1)
            facts["differs"][start:stop] = (bits[0] != bits[1]).any(axis=1)
            facts["nonzero"][start:stop] = bits[0].any(axis=1)
        facts["differs"][self.shorter :] = True
        return facts

    def differences(self, facts: np.ndarray, progress: Progress) -> list[Comparison]:
        """Compare the rows of each rank, then all rows."""
        references = Reference(facts["hash"][:, 1].copy()), Reference(facts["hash"][:, 0].copy())
        results = []
        for rank in range(self.partition.world_size):
            first, last = self.partition.owned_range(rank)
            parts = []
            for start in range(first, last, self.step):
                stop = min(start + self.step, last)
                nonzero = int(facts["nonzero"][start:stop].sum())
                part = Comparison(*self.names, "table", rank, stop - start, nonzero)
                ids = start + np.flatnonzero(facts["differs"][start:stop])
                if len(ids):
                    progress("describing", start, self.vocab_size)
                    values = self.rows(0, start, stop)[ids - start], self.rows(1, start, stop)[ids - start]
                    kinds = np.where(ids >= self.shorter, "row missing", "").astype(object)
                    rows = Differing(ids, ids[:, None], values, references, np.ones(len(ids), bool), kinds)
                    part = describe(part, rows, self.partition)
                parts.append(part)
            results.append(combined(self.names, "table", rank, parts))
        whole = combined(self.names, "table", None, results)
        return [*results, whole] if len(results) > 1 else [whole]

    def report(self, comparisons: list[Comparison]) -> Report:
        tables: list[dict[str, Any]] = []
        notes = []
        for name, table, padding in zip(self.names, self.tables, self.padding, strict=True):
            rows, of_padding = table.vocab_size, max(0, table.vocab_size - self.vocab_size)
            tables.append({"name": name, "path": str(table.path), "tensor": table.tensor, "dtype": table.dtype})
            tables[-1] |= {"rows": rows, "padding_rows": of_padding, "padding": padding}
            if table.dtype != self.dtype.name:
                notes.append(f"{name}: {table.dtype} rounded to {self.dtype.name} to be compared")
            if of_padding:
                notes.append(f"{name}: {of_padding} rows of padding ({padding}), not compared")
            if rows < self.vocab_size:
                missing = self.vocab_size - rows
                notes.append(f"{name}: lacks the last {missing} rows, which are not padding in the other table")
        ranks = f" over {self.partition.world_size} ranks" if self.partition.world_size > 1 else ""
        emb_size = self.tables[0].emb_size
        return Report(
            title=f"{self.vocab_size} x {emb_size} {self.dtype.name}{ranks}",
            notes=tuple(notes),
            sides={
                facts["name"]: {fact: str(facts[fact]) for fact in ("path", "tensor", "dtype", "rows")}
                for facts in tables
            },
            partition=self.partition,
            arrays={"table": "not zero"},
            comparisons=comparisons,
            facts={
                "tables": tables,
                "vocab_size": self.vocab_size,
                "emb_size": emb_size,
                "world_size": self.partition.world_size,
                "compared_as": self.dtype.name,
            },
        )


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
    step = max(1, _BATCH // table.emb_size)
    for begin in range(start, table.vocab_size, step):
        if (unsigned_view(table.rows(begin, min(begin + step, table.vocab_size))) != first).any():
            return "other values"
    if not first.any():
        return "zeros"
    return "one row repeated" if table.vocab_size - start > 1 else "other values"  # one row may be a token's
