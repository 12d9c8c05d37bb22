"""Comparison of heads, kinds of difference, and the report."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shared.bits import DTYPES, cast, ulp_distance
from shared.proof.case import Progress
from shared.proof.comparison import Comparison, Distances, combined, distances
from shared.proof.head_case import ARRAYS, HeadRecord
from shared.proof.head_expected import BOUNDS, UNIT_ROUNDOFF, Expected
from shared.proof.record import VERSIONS
from shared.proof.report import Report, case_report, sizes

__all__ = ["HEAD_KINDS", "HeadDiff"]

HEAD_KINDS = {
    "ranks disagree": "not the same bits on all ranks",
    "rank missing": "a sum over the ranks that lacks one of them",
    "one rank only": "one rank's part in place of the sum over the ranks",
    "counted w times": "every column counted w times, as if each rank had the logits of all",
    "padding counted": "columns of padding in the sum, an id of padding, or a gradient of its rows",
    "target off by one": "the next or the previous id in place of the target",
    "ignored target counted": "a value for a token whose target does not count",
    "lookup missing": "the table's gradient of the head alone, without that of the lookup",
    "head missing": "the table's gradient of the lookup alone, without that of the head",
    "times w": "w times the value: summed over the ranks once too often",
    "divided by w": "the value divided by w",
    "sum for mean": "the sum over the targets in place of the mean",
    "ignored in the mean": "a mean over all tokens, those included whose target does not count",
    "local id": "the row of the rank in place of the id",
    "id off by one": "the next or the previous id",
    "negated": "the value with the other sign",
    "zeroed": "zeros in place of the values",
    "imprecise": "within 4096 times the bound: sums or products in a narrower type",
    "NaN": "NaN on one side only",
    "other values": "none of these",
    "not examined": "beyond the first 256 rows that differ on a rank",
}
"""Kinds of difference of a head and their meaning."""

_EXAMINED = 256
_IMPRECISE = 4096  # bfloat16 has 2**16 times the roundoff of float32; an error is seldom above 1/16 of its bound


class HeadDiff:
    """Compares the records of a case with each other and the oracle.

    Attributes:
        near_ties: tokens whose argmax differs from the oracle's, where both logits are the greatest within rounding.
    """

    def __init__(self, expected: Expected, records: Mapping[str, HeadRecord]) -> None:
        self.expected, self.records, self.case = expected, records, expected.case
        self.near_ties: set[int] = set()

    def compare(self, progress: Progress = lambda *_: None) -> list[Comparison]:
        """Compare each rank's arrays, the table's gradient, and the ranks.

        Raises:
            ValueError: a backend recorded an array of another shape or dtype.
        """
        w = self.case.world_size
        results: list[Comparison] = []
        for pair in itertools.combinations([*self.records, "oracle"], 2):
            of_table = []
            for rank in range(w):
                progress(" and ".join(pair), rank, w)
                found = {what: self._compare(pair, what, rank) for what in ARRAYS}
                of_table.append(found["table gradient"])
                results += found.values()
            whole = combined(pair, "table gradient", None, of_table)
            results += [whole if what == whole.what else self._ranks_agree(pair, what) for what in ARRAYS]
        return results

    def report(self, comparisons: Sequence[Comparison], missing: Sequence[str], seconds: float) -> Report:
        """Report on the backends, given the result of ``compare``."""
        case, counted = self.case, self.expected.counted_T
        notes = [
            f"{case.source}; {'hidden states looked up in the table' if case.tied else 'normal hidden states'}",
            f"{counted.sum()} of {counted.size} targets count; the others lie outside the vocabulary [0, {case.vocab_size})"
            f"{', or are the last, which has no next id' if case.tied else ''}",
            f"bounds: sums in float32 (u = 2**-24), gradients rounded to {case.dtype}; the bits of all ranks are the same",
        ]
        near_ties = len(self.near_ties)
        if near_ties:
            notes.append(
                f"argmax of {near_ties} tokens: two logits are within rounding of each other, and either id is right"
            )
        versions = {name: record.versions for name, record in self.records.items()} | {"oracle": VERSIONS}
        report = case_report(case, case.batch_array("targets"), versions, comparisons, missing, seconds)
        return replace(
            report,
            title=f"{'tied head' if case.tied else 'head'} of {sizes(case, 'tokens')}",
            notes=tuple(notes),
            arrays=dict.fromkeys(ARRAYS, ""),
            facts={**report.facts, "unit_roundoff": UNIT_ROUNDOFF, "bounds": BOUNDS, "near_ties": near_ties},
            kinds=HEAD_KINDS,
        )

    def _array(self, name: str, what: str, rank: int, expected: np.ndarray) -> np.ndarray:
        """Rows of one side, in float64."""
        if name == "oracle":
            return expected
        array, legal = self.records[name].array(f"{what}.{rank}"), self._dtype(what)
        if array.size != expected.size or (array.dtype != legal if what != "argmax" else array.dtype.kind != "i"):
            raise ValueError(
                f"the {what} of {name} on rank {rank} must be {legal} with {expected.size} elements, "
                f"got {array.dtype} with {array.size}"
            )
        return array.reshape(expected.shape).astype(np.float64)

    def _dtype(self, what: str) -> np.dtype:
        return DTYPES[self.case.dtype] if "gradient" in what else np.dtype(np.float32)

    def _compare(self, pair: tuple[str, str], what: str, rank: int) -> Comparison:
        n = self.case.partition.rows_per_rank
        first, stop = (rank * n, (rank + 1) * n) if what == "table gradient" else (0, None)
        a, b = (self._array(name, what, rank, self.expected.values[what][first:stop]) for name in pair)
        bounds = self.expected.bounds[what][first:stop] * (1 if "oracle" in pair else 2)
        differing, share = _beyond(a, b, bounds)
        if what == "argmax":
            differing &= ~self._near_ties(a[:, 0], b[:, 0])
            found = Distances(np.zeros(len(a)), np.zeros(len(a)), {})
        else:
            left, right = (cast(side, self._dtype(what)) for side in (a, b))
            found = distances(left, right, ulp_distance(left, right))
        with np.errstate(invalid="ignore"):  # infinity minus itself
            error = np.nan_to_num(np.abs(a - b), nan=0, posinf=np.inf)  # from the oracle in float64, as bounds are
        found = found._replace(absolute=error.max(axis=1, initial=0))
        some = np.flatnonzero(differing)[:_EXAMINED]
        kinds, notes = np.where(differing, "not examined", "").astype(object), np.full(len(a), "", object)
        kinds[some], notes[some] = self._classify(what, a[some], b[some], first + some)

        def place(row: int) -> tuple[Iterable[Any], int, str]:
            if what == "loss":
                return (), -1, notes[row]
            if what == "table gradient":
                return (first + row,), first + row, notes[row]
            target = self.expected.targets_T[row] if self.expected.counted_T[row] else -1
            return np.unravel_index(row, self.case.ids_shape), target, notes[row]

        nonzero, bound = int(a.any(axis=1).sum()), float(np.nanmax(bounds, initial=0))
        equal = Comparison(*pair, what, rank, len(a), nonzero, bound=bound, share=share)
        return equal.with_differing(self.case.partition, kinds, found, place)

    def _near_ties(self, *sides: np.ndarray) -> np.ndarray:
        """Tokens whose ids on both sides have the greatest logit, within rounding."""
        found = sides[0] != sides[1]
        tokens = np.flatnonzero(found)
        for ids in sides:
            found[tokens] &= self.expected.is_best(tokens, ids[tokens])
        self.near_ties |= set(map(int, np.flatnonzero(found)))
        return found

    def _classify(self, what: str, a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kind and note of each differing row: the first fault that fits."""
        expected = self.expected
        right, bounds = expected.values[what][rows], expected.bounds[what][rows]
        left_is_wrong = _beyond(a, right, bounds)[0]
        if what == "argmax":
            left_is_wrong &= ~expected.is_best(rows, a[:, 0])
        wrong = np.where(left_is_wrong[:, None], a, b)
        kinds, notes = np.full(len(rows), "", object), np.full(len(rows), "", object)

        def settle(kind: str, where: np.ndarray, note: str = "") -> None:
            new = where & (kinds == "")
            kinds[new], notes[new] = kind, note

        settle("NaN", (np.isnan(wrong) & ~np.isnan(right)).any(axis=1))
        if what == "argmax":
            settle("padding counted", wrong[:, 0] >= self.case.vocab_size)
            settle("imprecise", expected.is_best(rows, wrong[:, 0], _IMPRECISE))
        elif what == "table gradient":
            settle("padding counted", rows >= self.case.vocab_size)
        elif what != "loss":
            settle("ignored target counted", ~expected.counted_T[rows])
        # Of several ranks that explain a row, the one that explains most rows is named.
        guesses = []
        with np.errstate(all="ignore"):
            for kind, note, guess in expected.faults(what, rows):
                if (kinds != "").all():
                    break
                finite = np.isfinite(guess)  # an infinite guess would fit everything
                largest = np.abs(guess).max(initial=0, where=finite)
                scale = 1 + largest / max(np.abs(right).max(initial=0), 1e-300)
                fits = ~_beyond(wrong, guess, bounds * scale)[0] & _beyond(guess, right, bounds)[0]
                guesses.append((kind, fits & finite.all(axis=1), note))
        for kind, fits, note in sorted(guesses, key=lambda each: -int(each[1].sum())):
            settle(kind, fits, note)
        settle("imprecise", ~_beyond(wrong, right, bounds * _IMPRECISE)[0] & (what != "argmax"))
        settle("other values", kinds == "")
        return kinds, notes

    def _ranks_agree(self, pair: tuple[str, str], what: str) -> Comparison:
        """Compare the ranks' copies of one array; a row is a rank."""
        w, kinds = self.case.world_size, np.full(self.case.world_size, "", object)
        for name in set(pair) - {"oracle"}:
            copies = [self.records[name].array(f"{what}.{rank}").tobytes() for rank in range(w)]
            kinds[[copy != copies[0] for copy in copies]] = "ranks disagree"
        found = Distances(np.full(w, np.nan), np.zeros(w), {})
        equal = Comparison(*pair, what, None, w, w)
        return equal.with_differing(
            self.case.partition, kinds, found, lambda rank: ((rank,), -1, f"rank {rank} against rank 0")
        )


def _beyond(a: np.ndarray, b: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows beyond their bound, and the largest error divided by it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        error = np.where(same, 0, np.abs(a - b))
        beyond = ~(same | (error <= bounds))
        share = np.where(same, 0, error / bounds)
    return beyond.any(axis=1), float(np.nanmax(share, initial=0))
