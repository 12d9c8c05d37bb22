"""Comparing two records: what is equal to the last bit, and what else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from shared.bits import canonical_nan, row_hashes, unsigned_view
from shared.proof.case import sha256
from shared.proof.classify import Side, classify
from shared.proof.comparison import Comparison, Differences
from shared.proof.record import Record
from shared.proof.rows import Rows

__all__ = ["compare_records"]

_CHUNK = 1024


def compare_records(
    left: Record, right: Record, progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[Comparison]:
    """Compare two records of one case: every rank's forward and gradient, then the sum's and the whole table's.

    Each rank's lookup is compared bit for bit. In the sum and in gradients, where something is added, any NaN equals any
    other: arithmetic does not say which it returns.

    Raises:
        ValueError: the records are of different cases, or one is damaged.
    """
    left.same_case(right)
    pair = _Pair(left, right)
    results = []
    for rank in range(left.world_size):
        progress(f"{left.backend} and {right.backend}", rank, left.world_size)
        results += [pair.forward(rank), pair.gradient(rank)]
    return [*results, pair.forward(None), pair.gradient(None)]


class _Pair:
    """Two records of one case, with what is needed to name their differing rows."""

    def __init__(self, left: Record, right: Record) -> None:
        self.records = (left, right)
        self.facts, self.partition, self.padding_idx = left, left.partition, left.padding_idx
        self.ids, self.table_hashes = left.array("ids").reshape(-1), left.array("row_hashes")
        if self.ids.dtype != np.int64 or len(self.ids) != math.prod(left.ids_shape):
            raise ValueError(f"{left.path}: a damaged record, its ids do not fit their shape")
        if self.table_hashes.shape != (left.vocab_size,) or self.table_hashes.dtype != np.uint64:
            raise ValueError(f"{left.path}: a damaged record, its row hashes do not fit the table")
        if sha256(self.ids) != left.checksums.get("ids"):
            raise ValueError(f"{left.path}: a damaged record, its ids are not those that its header tells of")
        for name, mine in (("ids", self.ids), ("row_hashes", self.table_hashes)):
            if not np.array_equal(mine, right.array(name).reshape(-1)):
                raise ValueError(f"{left.path} and {right.path} disagree about {name}: one of them is damaged")

    def forward(self, rank: int | None) -> Comparison:
        name = "sum" if rank is None else f"forward.{rank}"
        a, b = (record.rows(name) for record in self.records)
        differing = _differing(a, b, arithmetic=rank is None)
        if not len(differing):
            return self._no_difference("forward", rank, a)
        positions = np.arange(len(self.ids)).reshape(self.facts.ids_shape)
        if rank is not None:
            positions = self.facts.part_of(positions, rank)
        positions = positions.reshape(-1)[differing]
        ids = self.ids[positions]
        whole = rank is None or self.facts.reduction != "none"
        expected = np.asarray(self.partition.is_valid(ids) if whole else self.partition.owns(ids, rank))
        sides = (Side(a.take(differing), self.table_hashes), Side(b.take(differing), self.table_hashes))
        kinds = classify(ids, sides, self.partition, None, expected)
        if self._another_ranks("forward", rank, a, b):
            kinds[:] = "ranks swapped"
        return self._differences(
            "forward", rank, a, ids, lambda i: np.unravel_index(positions[i], self.facts.ids_shape), sides, kinds
        )

    def _another_ranks(self, what: str, rank: int | None, a: Rows, b: Rows) -> bool:
        """Whether one side has, for this rank, just what the other side has for another rank."""
        if rank is None or (what == "forward" and self.facts.reduction == "all_reduce"):  # there, all ranks' are alike
            return False
        for other in set(range(self.partition.world_size)) - {rank}:
            theirs = [record.rows(f"{what}.{other}") for record in self.records]
            if any(len(mine.index) and _equal(mine, its) for mine, its in zip((b, a), theirs, strict=True)):
                return True
        return False

    def gradient(self, rank: int | None) -> Comparison:
        n, w = self.partition.rows_per_rank, self.partition.world_size
        start = 0 if rank is None else int(self.partition.start(rank))
        a, b = (
            _whole([record.rows(f"gradient.{r}") for r in range(w)], n)
            if rank is None
            else record.rows(f"gradient.{rank}")
            for record in self.records
        )
        differing = _differing(a, b, arithmetic=True)
        if not len(differing):
            return self._no_difference("gradient", rank, a)
        ids = differing + start
        hashes = [self._gradient_hashes(record) for record in self.records]
        sides = (Side(a.take(differing), hashes[1]), Side(b.take(differing), hashes[0]))
        kinds = classify(ids, sides, self.partition, self.padding_idx, np.isin(ids, self.ids))
        if self._another_ranks("gradient", rank, a, b):
            kinds[:] = "ranks swapped"
        return self._differences("gradient", rank, a, ids, lambda i: (ids[i],), sides, kinds)

    def _gradient_hashes(self, record: Record) -> np.ndarray:
        """The hash of every row of the whole gradient that a record has; 0 for zero rows."""
        hashes = np.zeros(self.partition.padded_vocab_size, np.uint64)
        for rank in range(self.partition.world_size):
            rows = record.rows(f"gradient.{rank}")
            hashes[rows.index + self.partition.start(rank)] = row_hashes(rows.values)
        return hashes

    def _no_difference(self, what: str, rank: int | None, a: Rows) -> Comparison:
        left, right = self.records
        return Comparison(left.backend, right.backend, what, rank, a.total, len(a.index))

    def _differences(
        self,
        what: str,
        rank: int | None,
        a: Rows,
        ids: np.ndarray,
        index_of: Callable[[int], tuple[Any, ...]],
        sides: tuple[Side, Side],
        kinds: np.ndarray,
    ) -> Comparison:
        left, right = self.records
        found = Differences((left.backend, right.backend), self.partition)
        found.add(ids, index_of, sides, kinds)
        return found.comparison(what, rank, a.total, len(a.index))


def _equal(a: Rows, b: Rows) -> bool:
    return np.array_equal(a.index, b.index) and np.array_equal(unsigned_view(a.values), unsigned_view(b.values))


def _whole(parts: list[Rows], rows_per_rank: int) -> Rows:
    index = np.concatenate([rows.index + rank * rows_per_rank for rank, rows in enumerate(parts)])
    return Rows(index, np.concatenate([rows.values for rows in parts]), rows_per_rank * len(parts))


def _differing(a: Rows, b: Rows, arithmetic: bool) -> np.ndarray:
    """The numbers of the rows that are not equal."""
    index = np.union1d(a.index, b.index)
    found = [index[:0]]
    for start in range(0, len(index), _CHUNK):
        some = index[start : start + _CHUNK]
        left, right = a.take(some), b.take(some)
        if arithmetic:
            left, right = canonical_nan(left), canonical_nan(right)
        found.append(some[(unsigned_view(left) != unsigned_view(right)).any(axis=1)])
    return np.concatenate(found)
