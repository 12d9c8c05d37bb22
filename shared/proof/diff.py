"""Comparison of two records, bit by bit."""

import math
from functools import cached_property

import numpy as np

from shared.bits import canonical_nan, row_hashes, unsigned_view
from shared.proof.case import Progress
from shared.proof.classify import Differing, Reference
from shared.proof.comparison import Comparison, combined, describe
from shared.proof.record import Record, Rows

__all__ = ["compare_records"]

_CHUNK = 1024


@np.errstate(invalid="ignore")  # signalling NaN
def compare_records(left: Record, right: Record, progress: Progress = lambda *_: None) -> list[Comparison]:
    """Compare each rank's forward and gradient, the sum and the whole gradient.

    Each rank's forward is compared bit for bit. In the sum and in gradients, any NaN equals any other: arithmetic does not
    specify the NaN it returns.

    Raises:
        ValueError: the records are of different cases, or one is damaged.
    """
    left.same_case(right)
    pair = _Pair(left, right)
    results = []
    for rank in range(left.world_size):
        progress(" and ".join(pair.names), rank, left.world_size)
        results += [pair.compare("forward", rank), pair.compare("gradient", rank)]
    return [*results, pair.compare("forward", None), combined(pair.names, "gradient", None, results[1::2])]


class _Pair:
    """Two records of one case, and what describes their rows."""

    def __init__(self, left: Record, right: Record) -> None:
        self.records, self.facts, self.partition = (left, right), left, left.partition
        self.names = left.backend, right.backend
        self.ids, table_hashes = left.array("ids").reshape(-1), left.array("row_hashes")
        if self.ids.dtype != np.int64 or len(self.ids) != math.prod(left.ids_shape):
            raise ValueError(f"{left.path}: a damaged record, its ids do not fit their shape")
        if table_hashes.shape != (left.vocab_size,) or table_hashes.dtype != np.uint64:
            raise ValueError(f"{left.path}: a damaged record, its row hashes do not fit the table")
        for name, mine in (("ids", self.ids), ("row_hashes", table_hashes)):
            if not np.array_equal(mine, right.array(name).reshape(-1)):
                raise ValueError(f"{left.path} and {right.path} disagree about {name}: one of them is damaged")
        self.table = Reference(table_hashes)

    def compare(self, what: str, rank: int | None) -> Comparison:
        """Compare one array of one rank; the sum for None."""
        a, b = (record.rows("sum" if rank is None else f"{what}.{rank}") for record in self.records)
        arithmetic = rank is None or what == "gradient"
        kind = "ranks swapped" if self._are_another_ranks(what, rank, a, b) else ""
        parts = [Comparison(*self.names, what, rank, a.total, len(a.index))]
        index = np.union1d(a.index, b.index)
        for start in range(0, len(index), _CHUNK):
            rows = index[start : start + _CHUNK]
            left, right = a.take(rows), b.take(rows)
            bits = [unsigned_view(canonical_nan(side) if arithmetic else side) for side in (left, right)]
            differ = (bits[0] != bits[1]).any(axis=1)
            if differ.any():
                parts.append(self._describe(what, rank, kind, rows[differ], (left[differ], right[differ])))
        return combined(self.names, what, rank, parts)

    def _describe(
        self, what: str, rank: int | None, kind: str, rows: np.ndarray, values: tuple[np.ndarray, np.ndarray]
    ) -> Comparison:
        """Describe differing rows of one array, given their numbers."""
        if what == "forward":
            positions = self._positions(rank)[rows]
            ids, references, padding_idx = self.ids[positions], (self.table, self.table), None
            shape = self.facts.ids_shape
            index = np.array(np.unravel_index(positions, shape or (1,))).T[:, : len(shape)]
            whole = rank is None or self.facts.reduction != "none"
            expected = self.partition.is_valid(ids) if whole else self.partition.owns(ids, rank)
        else:
            ids = rows + self.partition.start(rank)
            references, padding_idx = self.gradients, self.facts.padding_idx
            index, expected = ids[:, None], np.isin(ids, self.ids)
        found = Differing(ids, index, values, references, expected, np.full(len(ids), kind, object))
        return describe(Comparison(*self.names, what, rank, 0, 0), found, self.partition, padding_idx)

    def _positions(self, rank: int | None) -> np.ndarray:
        """Flat positions in the ids of the rows of a forward result."""
        positions = np.arange(len(self.ids)).reshape(self.facts.ids_shape)
        return (positions if rank is None else self.facts.part_of(positions, rank)).reshape(-1)

    def _are_another_ranks(self, what: str, rank: int | None, a: Rows, b: Rows) -> bool:
        """Whether the rows of a side are the other's for another rank."""
        if rank is None or (what == "forward" and self.facts.reduction == "all_reduce"):  # there all ranks' are equal
            return False
        left, right = (
            [(each.sha256[f"{what}.{r}.index"], each.sha256[f"{what}.{r}.values"]) for r in range(each.world_size)]
            for each in self.records
        )
        return any(
            (len(a.index) > 0 and left[rank] == right[other]) or (len(b.index) > 0 and right[rank] == left[other])
            for other in set(range(len(left))) - {rank}
        )

    @cached_property
    def gradients(self) -> tuple[Reference, Reference]:
        """The whole gradient of the other side, for each side."""
        found = []
        for record in self.records:
            hashes = np.zeros(self.partition.padded_vocab_size, np.uint64)
            for rank in range(record.world_size):
                rows = record.rows(f"gradient.{rank}")
                hashes[rows.index + self.partition.start(rank)] = row_hashes(rows.values)
            found.append(Reference(hashes))
        return found[1], found[0]
