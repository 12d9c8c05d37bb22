"""Expected arrays of a head, their bounds, and those of faults.

All of it is float64 NumPy. Shape suffixes: T tokens, V columns of the logits or rows of the table, E hidden columns, K some
tokens or rows.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np

from shared.bits import DTYPES
from shared.head import LossOptions
from shared.proof import head_oracle
from shared.proof.case import Progress
from shared.proof.head_case import HeadCase

__all__ = ["BOUNDS", "UNIT_ROUNDOFF", "Expected", "Fault"]

UNIT_ROUNDOFF = 2.0**-24
"""Of the products and sums of a head: float32, whatever the dtype of the table."""

BOUNDS = {
    "loss": "mean of the bounds of the logprobs of all targets that count, + 8 u |loss|",
    "logprobs": "2 t, where t = u (4 sqrt(emb_size) |hidden| max|row| + 64) bounds the error of a token's logits",
    "hidden gradient": "4 (t + 2 u sqrt(vocab_size)) max|element of the table| / count, + rounding",
    "table gradient": "sum of (p + [target]) (2 t + 4 u sqrt(tokens)) max|element of hidden| / count, + rounding",
    "argmax": "equal; ids whose logits are within 2 t of each other are both right",
}
"""How far each array may be from the oracle, in words.

``u`` is the unit roundoff of products and sums, ``|.|`` the Euclidean norm, ``p`` a probability, ``count`` the number of
targets that count. Rounding is to the dtype of the table, once; if tied, once for each use, each hidden state, and the sum.
The factor of a square root is from the probabilistic analysis of Higham and Mary (2019), at four standard deviations.
"""

_ELEMENTS = 1 << 24  # of the logits at once: 128 MiB


class Fault(NamedTuple):
    """Fault: its kind, a note, and the rows it gives."""

    kind: str
    note: str
    rows: Callable[[np.ndarray], np.ndarray]


class Expected:
    """Result of the oracle for a case.

    Attributes:
        values: each of ``shared.proof.head_record.ARRAYS`` by name, ``[rows, columns]``; a row is a token or a row of the
            table, padding included.
        bounds: largest error of each, of a shape that broadcasts to it.
        count: number of targets that count.
    """

    def __init__(self, case: HeadCase, progress: Progress = lambda *_: None) -> None:
        self.case, self.partition, v = case, case.partition, case.vocab_size
        dtype, u = DTYPES[case.dtype], UNIT_ROUNDOFF
        targets = case.batch_array("targets").reshape(-1)
        self.hidden_TE = case.hidden_states().reshape(-1, case.emb_size).astype(np.float64)
        self.table_VE = np.concatenate([case.rank_rows(rank) for rank in range(case.world_size)]).astype(np.float64)
        self.counted_T = (targets >= 0) & (targets < v)
        self.targets_T = np.where(self.counted_T, targets, 0)
        self.ids_T = case.batch_array("ids").reshape(-1) if case.tied else targets[:0]
        tokens, self.count = len(targets), max(1, int(self.counted_T.sum()))

        with np.errstate(all="ignore"):  # tables of NaN and infinity
            # What is not finite gives infinity or NaN, of which no bound is needed.
            lengths_T, lengths_V = (
                _finite(np.linalg.norm(rows, axis=1)) for rows in (self.hidden_TE, self.table_VE[:v])
            )
            of_products_T = 4 * u * math.sqrt(case.emb_size) * lengths_T * lengths_V.max()
            self.logit_bound_T = of_products_T
            t_T = of_products_T + 64 * u
            largest_T = _finite(np.abs(self.hidden_TE)).max(axis=1, initial=0)
            weight_T = (2 * t_T + 4 * u * math.sqrt(tokens)) * largest_T
            self._run(weight_T, progress)
            mass_V, loss = self._mass_V, self.values["loss"]
            hidden_bound = (4 * t_T + 8 * u * math.sqrt(v)) * _finite(np.abs(self.table_VE[:v])).max() / self.count
            hidden_bound_TE = np.where(self.counted_T, hidden_bound, 0)[:, None] + np.zeros_like(self.hidden_TE)
            hidden_bound_TE += _rounding(self.values["hidden gradient"], dtype)
            table_bound_VE = mass_V[:, None] + _rounding(self.values["table gradient"], dtype)
            if case.tied:
                for part in (self.head_VE, self.lookup_VE):
                    table_bound_VE += _rounding(part, dtype)
                of_sums_TE = 4 * u * math.sqrt(tokens) * np.abs(self.values["hidden gradient"])
                table_bound_VE += self._scatter(hidden_bound_TE + of_sums_TE, np.arange(tokens))
            table_bound_VE[v:] = 0
            self.bounds = {
                "loss": np.atleast_2d(2 * t_T[self.counted_T].sum() / self.count + 8 * u * np.abs(loss)),
                "logprobs": np.where(self.counted_T, 2 * t_T, 0)[:, None],
                "hidden gradient": hidden_bound_TE,
                "table gradient": table_bound_VE,
                "argmax": np.zeros((tokens, 1)),
            }

    def _run(self, weight_T: np.ndarray, progress: Progress) -> None:
        """Run the oracle over chunks of tokens."""
        v, w, tokens = self.case.vocab_size, self.case.world_size, len(self.targets_T)
        # A further column, 0 in the table: its gradient sums (p - [target]) * weight / count.
        hidden = np.column_stack([self.hidden_TE, weight_T])
        table = np.column_stack([self.table_VE, np.zeros(len(self.table_VE))])
        gradient, hidden_gradient = np.zeros_like(table), np.zeros_like(hidden)
        loss, logprobs = 0.0, np.zeros(tokens)
        self.lse_WT, self.best_WT = np.zeros((w, tokens)), np.zeros((w, tokens))
        self.best_id_WT = np.zeros((w, tokens), np.int64)
        argmax = np.zeros(tokens, np.int64)
        for part in self._chunks(np.arange(tokens)):
            progress("oracle", int(part[0]), tokens)
            targets = np.where(self.counted_T[part], self.targets_T[part], -1)
            options = LossOptions(ignore_index=-1, reduction="sum")
            found = head_oracle.loss(hidden[part], table, targets, v, options, grad_loss=1 / self.count)
            loss += float(found.loss)
            logprobs[part], hidden_gradient[part] = found.logprobs, found.hidden_grad
            gradient += found.weight_grad
            x = head_oracle.logits(self.hidden_TE[part], self.table_VE, v)
            argmax[part] = head_oracle.argmax(x, v)
            for rank in range(w):
                start, stop = self.partition.owned_range(rank)
                self.lse_WT[rank, part] = head_oracle.logsumexp(x[:, start:stop])
                self.best_WT[rank, part] = x[:, start:stop].max(axis=1, initial=-np.inf)
                self.best_id_WT[rank, part] = start + (x[:, start:stop].argmax(axis=1) if start < stop else 0)
        self.lse_T = head_oracle.logsumexp(self.lse_WT.T)
        onto = np.zeros(len(table))
        np.add.at(onto, self.targets_T[self.counted_T], weight_T[self.counted_T])
        self._mass_V = gradient[:, -1] + 2 * onto / self.count
        self.head_VE = gradient[:, :-1]
        hidden_gradient_TE = hidden_gradient[:, :-1]
        self.lookup_VE = self._scatter(hidden_gradient_TE, np.arange(tokens))
        self.values = {
            "loss": np.array([[loss / self.count]]),
            "logprobs": logprobs[:, None],
            "hidden gradient": hidden_gradient_TE,
            "table gradient": self.head_VE + self.lookup_VE,
            "argmax": argmax[:, None].astype(np.float64),
        }

    def _chunks(self, tokens_K: np.ndarray) -> list[np.ndarray]:
        step = max(1, _ELEMENTS // len(self.table_VE))
        return [tokens_K[start : start + step] for start in range(0, len(tokens_K), step)]

    def _scatter(self, grad_KE: np.ndarray, tokens_K: np.ndarray) -> np.ndarray:
        """Hidden gradients summed by id; zeros unless tied."""
        total = np.zeros_like(self.table_VE)
        if self.case.tied:
            ids = self.ids_T[tokens_K]
            valid = self.partition.is_valid(ids)
            np.add.at(total, ids[valid], grad_KE[valid])
        return total

    def is_best(self, tokens_K: np.ndarray, ids_K: np.ndarray, times: float = 1) -> np.ndarray:
        """Whether each id's logit is the greatest, within its bound."""
        valid = (ids_K >= 0) & (ids_K < self.case.vocab_size)
        rows_KE = self.table_VE[np.where(valid, ids_K, 0).astype(np.int64)]
        with np.errstate(invalid="ignore"):  # tables of infinity
            below = self.best_WT[:, tokens_K].max(axis=0) - np.einsum("te,te->t", self.hidden_TE[tokens_K], rows_KE)
        return valid & (below <= 2 * times * self.logit_bound_T[tokens_K])

    def faults(self, what: str, rank: int | None) -> Iterator[Fault]:
        """Yield what each fault would make of one array."""
        w, values = self.case.world_size, self.values[what]
        if what == "argmax":
            yield from self._argmax_faults()
            return
        if what == "hidden gradient" and w > 1:
            ranges = [self.partition.owned_range(r) for r in range(w)]
            parts = [partial(self._hidden_gradient, self.lse_T, self.targets_T, columns) for columns in ranges]
            for r, part in enumerate(parts):
                yield Fault("rank missing", f"without rank {r}", partial(_rest, values, part))
            for r, part in enumerate(parts):
                yield Fault("one rank only", f"rank {r}'s part", part)
        if what == "table gradient" and self.case.tied:
            yield Fault("lookup missing", "", self.head_VE.__getitem__)
            yield Fault("head missing", "", self.lookup_VE.__getitem__)
        for lse_T, targets_T, kind, note in self._wrong_statistics():
            yield Fault(kind, note, partial(self._what_if, what, lse_T, targets_T))
        tokens = len(self.targets_T)
        factors = {
            ("times w", f"times {w}"): w,
            ("divided by w", f"divided by {w}"): 1 / w,
            ("sum for mean", f"times {self.count}"): self.count,
            ("ignored in the mean", f"divided by {tokens}, not {self.count}"): self.count / max(tokens, 1),
            ("negated", ""): -1,
            ("zeroed", ""): 0,
        }
        for (kind, note), factor in factors.items():
            if what != "logprobs" or kind in ("negated", "zeroed"):
                yield Fault(kind, note, (values * factor).__getitem__)

    def _wrong_statistics(self) -> Iterator[tuple[np.ndarray, np.ndarray, str, str]]:
        """Logsumexp and targets of faults in sums and ids."""
        w, v, padding = self.case.world_size, self.case.vocab_size, self.partition.padding_rows
        if w > 1:
            for r in range(w):
                without = head_oracle.logsumexp(np.delete(self.lse_WT, r, axis=0).T)
                yield without, self.targets_T, "rank missing", f"without rank {r}"
            for r in range(w):
                yield self.lse_WT[r], self.targets_T, "one rank only", f"rank {r}'s sum"
            yield self.lse_T + math.log(w), self.targets_T, "counted w times", f"the sum times {w}"
        if padding:
            yield np.logaddexp(self.lse_T, math.log(padding)), self.targets_T, "padding counted", f"{padding} columns"
        for step in (1, -1):
            yield self.lse_T, (self.targets_T + step) % v, "target off by one", f"target {step:+d}"

    def _what_if(self, what: str, lse_T: np.ndarray, targets_T: np.ndarray, rows_K: np.ndarray) -> np.ndarray:
        """Rows of an array, with another logsumexp and other targets."""
        if what == "logprobs":
            return self._logprobs(rows_K, lse_T, targets_T)[:, None]
        if what == "loss":
            return np.array([[-self._logprobs(np.arange(len(lse_T)), lse_T, targets_T).sum() / self.count]])
        hidden_gradient = partial(self._hidden_gradient, lse_T, targets_T, (0, self.case.vocab_size))
        if what == "hidden gradient":
            return hidden_gradient(rows_K)
        total = np.zeros((len(rows_K), self.case.emb_size))
        owned = rows_K[rows_K < self.case.vocab_size]
        for part in self._chunks(np.flatnonzero(self.counted_T)):
            p = np.exp(self.hidden_TE[part] @ self.table_VE[owned].T - lse_T[part, None])
            p -= targets_T[part, None] == owned
            total[: len(owned)] += p.T @ self.hidden_TE[part] / self.count
        if self.case.tied:
            tokens = np.flatnonzero(np.isin(self.ids_T, rows_K))
            total += self._scatter(hidden_gradient(tokens), tokens)[rows_K]
        return total

    def _logprobs(self, tokens_K: np.ndarray, lse_T: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
        x = np.einsum("te,te->t", self.hidden_TE[tokens_K], self.table_VE[targets_T[tokens_K]])
        return np.where(self.counted_T[tokens_K], x - lse_T[tokens_K], 0)

    def _hidden_gradient(
        self, lse_T: np.ndarray, targets_T: np.ndarray, columns: tuple[int, int], tokens_K: np.ndarray
    ) -> np.ndarray:
        """Gradient of some tokens, from a range of columns of the logits."""
        found, rows_VE = np.zeros((len(tokens_K), self.case.emb_size)), self.table_VE[slice(*columns)]
        for at in self._chunks(np.arange(len(tokens_K))):
            part = tokens_K[at]
            p = np.exp(self.hidden_TE[part] @ rows_VE.T - lse_T[part, None])
            p -= targets_T[part, None] == np.arange(*columns)
            found[at] = np.where(self.counted_T[part, None], p @ rows_VE / self.count, 0)
        return found

    def _argmax_faults(self) -> Iterator[Fault]:
        ids, tokens = self.values["argmax"], np.arange(len(self.targets_T))
        for r in range(self.case.world_size if self.case.world_size > 1 else 0):
            others = np.delete(np.arange(self.case.world_size), r)
            best = others[self.best_WT[others].argmax(axis=0)]
            without = self.best_id_WT[best, tokens][:, None].astype(np.float64)
            yield Fault("rank missing", f"without rank {r}", without.__getitem__)
            alone = self.best_id_WT[r][:, None].astype(np.float64)
            yield Fault("one rank only", f"rank {r}'s own", alone.__getitem__)
        starts = self.partition.start(self.partition.owner(ids.astype(np.int64)))
        yield Fault("local id", "row of its rank, not of the table", (ids - starts).__getitem__)
        for step in (1, -1):
            yield Fault("id off by one", f"{step:+d}", (ids + step).__getitem__)


def _rest(values: np.ndarray, part: Callable[[np.ndarray], np.ndarray], rows_K: np.ndarray) -> np.ndarray:
    return values[rows_K] - part(rows_K)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, nan=0, posinf=0)


def _rounding(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Largest error of rounding to ``dtype`` once, flushing included."""
    info = ml_dtypes.finfo(dtype)
    smallest = float(info.smallest_subnormal) / 2 + float(np.finfo(np.float32).smallest_normal)
    rounded: np.ndarray = np.abs(values) * (float(info.eps) / 2) + smallest
    return rounded
