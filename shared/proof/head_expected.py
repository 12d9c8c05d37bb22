"""Expected arrays of a head, their bounds, and those of faults.

All of it is float64 NumPy. Shape suffixes: T tokens, V rows of the table or columns of the logits, W ranks, N columns of a
rank, E hidden columns, C tokens that count, K some tokens or rows.
"""

import math
from collections.abc import Iterator

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


Fault = tuple[str, str, np.ndarray]
"""Kind of a fault, note, and the rows that it gives."""


class Expected:
    """Result of the oracle for a case.

    Attributes:
        values: each of ``shared.proof.head_case.ARRAYS`` by name, ``[rows, columns]``; a row is a token or a row of the
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
            self.logit_bound_T = 4 * u * math.sqrt(case.emb_size) * lengths_T * lengths_V.max()
            t_T = self.logit_bound_T + 64 * u
            largest_T = _finite(np.abs(self.hidden_TE)).max(axis=1, initial=0)
            weight_T = np.where(self.counted_T, (2 * t_T + 4 * u * math.sqrt(tokens)) * largest_T / self.count, 0)
            mass_V = self._run(weight_T, progress)
            hidden_bound = (4 * t_T + 8 * u * math.sqrt(v)) * _finite(np.abs(self.table_VE[:v])).max() / self.count
            hidden_bound_TE = np.where(self.counted_T, hidden_bound, 0)[:, None] + np.zeros_like(self.hidden_TE)
            hidden_bound_TE += _rounding(self.values["hidden gradient"], dtype)
            table_bound_VE = mass_V[:, None] + _rounding(self.values["table gradient"], dtype)
            if case.tied:
                of_sums_TE = 4 * u * math.sqrt(tokens) * np.abs(self.values["hidden gradient"])
                table_bound_VE += self._scatter(hidden_bound_TE + of_sums_TE)
                for part in (self.head_VE, self.lookup_VE):
                    table_bound_VE += _rounding(part, dtype)
            table_bound_VE[v:] = 0
            self.bounds = {
                "loss": np.atleast_2d(2 * t_T[self.counted_T].sum() / self.count + 8 * u * np.abs(self.values["loss"])),
                "logprobs": np.where(self.counted_T, 2 * t_T, 0)[:, None],
                "hidden gradient": hidden_bound_TE,
                "table gradient": table_bound_VE,
                "argmax": np.zeros((tokens, 1)),
            }

    def _run(self, weight_T: np.ndarray, progress: Progress) -> np.ndarray:
        """Run the oracle over chunks of tokens.

        Returns:
            ``[V]``: for each row the sum of ``weight_T``, times the token's probability, + 1 for its target.
        """
        v, w, tokens = self.case.vocab_size, self.case.world_size, len(self.targets_T)
        self.head_VE, hidden_gradient_TE = np.zeros_like(self.table_VE), np.zeros_like(self.hidden_TE)
        self.lse_TW, self.best_TW = np.zeros((tokens, w)), np.zeros((tokens, w))
        self.best_id_TW = np.zeros((tokens, w), np.int64)
        loss, logprobs_T, mass_V = 0.0, np.zeros(tokens), np.zeros(len(self.table_VE))
        np.add.at(mass_V, self.targets_T, weight_T)
        options, targets = LossOptions(ignore_index=-1, reduction="sum"), np.where(self.counted_T, self.targets_T, -1)
        step = max(1, _ELEMENTS // len(self.table_VE))
        for start in range(0, tokens, step):
            progress("oracle", start, tokens)
            part = slice(start, start + step)
            found = head_oracle.loss(self.hidden_TE[part], self.table_VE, targets[part], v, options, 1 / self.count)
            loss += float(found.loss) / self.count
            logprobs_T[part], hidden_gradient_TE[part] = found.logprobs, found.hidden_grad
            self.head_VE += found.weight_grad
            x_TV = head_oracle.logits(self.hidden_TE[part], self.table_VE, v)
            p_TV = np.where(weight_T[part, None] > 0, np.exp(x_TV - found.lse[:, None]), 0)
            mass_V += weight_T[part] @ p_TV
            x_TWN = x_TV.reshape(len(x_TV), w, -1)
            self.lse_TW[part], self.best_TW[part] = head_oracle.logsumexp(x_TWN), x_TWN.max(axis=2)
            self.best_id_TW[part] = x_TWN.argmax(axis=2) + self.partition.start(np.arange(w))
        self.lse_T = head_oracle.logsumexp(self.lse_TW)
        self.lookup_VE = self._scatter(hidden_gradient_TE)
        self.values = {
            "loss": np.array([[loss]]),
            "logprobs": logprobs_T[:, None],
            "hidden gradient": hidden_gradient_TE,
            "table gradient": self.head_VE + self.lookup_VE,
            "argmax": self._best(np.arange(w)),
        }
        return mass_V

    def _best(self, ranks: np.ndarray) -> np.ndarray:
        """Argmax over the columns of some ranks."""
        best_T = self.best_TW[:, ranks].argmax(axis=1)
        return np.take_along_axis(self.best_id_TW[:, ranks], best_T[:, None], 1).astype(np.float64)

    def _scatter(self, grad_TE: np.ndarray) -> np.ndarray:
        """Gradients of hidden states summed by id; zeros unless tied."""
        total = np.zeros_like(self.table_VE)
        if self.case.tied:
            valid_T = self.partition.is_valid(self.ids_T)
            np.add.at(total, self.ids_T[valid_T], grad_TE[valid_T])
        return total

    def is_best(self, tokens_K: np.ndarray, ids_K: np.ndarray, times: float = 1) -> np.ndarray:
        """Whether each id's logit is the greatest, within its bound."""
        valid = (ids_K >= 0) & (ids_K < self.case.vocab_size)
        rows_KE = self.table_VE[np.where(valid, ids_K, 0).astype(np.int64)]
        with np.errstate(invalid="ignore"):  # tables of infinity
            below = self.best_TW[tokens_K].max(axis=1) - np.einsum("te,te->t", self.hidden_TE[tokens_K], rows_KE)
        return valid & (below <= 2 * times * self.logit_bound_T[tokens_K])

    def faults(self, what: str, rows_K: np.ndarray) -> Iterator[Fault]:
        """Yield what each fault would make of some rows of an array."""
        w, tokens, values = self.case.world_size, len(self.targets_T), self.values[what][rows_K]
        ranks = self._ranks()
        if what == "argmax":
            for r in ranks:
                yield "rank missing", f"without rank {r}", self._best(ranks[ranks != r])[rows_K]
                yield "one rank only", f"rank {r}'s own", self._best(np.array([r]))[rows_K]
            starts = self.partition.start(self.partition.owner(values.astype(np.int64)))
            yield "local id", "row of its rank, not of the table", values - starts
            for step in (1, -1):
                yield "id off by one", f"{step:+d}", values + step
            return
        if what == "hidden gradient":
            for r in ranks:
                yield "rank missing", f"without rank {r}", values - self._part_of_rank(r, rows_K)
            for r in ranks:
                yield "one rank only", f"rank {r}'s part", self._part_of_rank(r, rows_K)
        if what == "table gradient" and self.case.tied:
            yield "lookup missing", "", self.head_VE[rows_K]
            yield "head missing", "", self.lookup_VE[rows_K]
        for kind, note, lse_T, targets_T in self._wrong_statistics():
            yield kind, note, self._what_if(what, lse_T, targets_T, rows_K)
        yield "negated", "", -values
        yield "zeroed", "", 0 * values
        if what != "logprobs":
            yield "times w", f"times {w}", values * w
            yield "divided by w", f"divided by {w}", values / w
            yield "sum for mean", f"times {self.count}", values * self.count
            ignored = f"divided by {tokens}, not {self.count}"
            yield "ignored in the mean", ignored, values * self.count / max(tokens, 1)

    def _ranks(self) -> np.ndarray:
        """Ranks that can be missing or alone: those with rows, if several."""
        starts, stops = np.array([self.partition.owned_range(r) for r in range(self.case.world_size)]).T
        ranks = np.flatnonzero(starts < stops)
        return ranks if len(ranks) > 1 else ranks[:0]

    def _wrong_statistics(self) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
        """Kind, note, logsumexp and targets of faults in sums and ids."""
        w, v, padding = self.case.world_size, self.case.vocab_size, self.partition.padding_rows
        ranks = self._ranks()
        for r in ranks:
            without = head_oracle.logsumexp(np.delete(self.lse_TW, r, axis=1))
            yield "rank missing", f"without rank {r}", without, self.targets_T
        for r in ranks:
            yield "one rank only", f"rank {r}'s sum", self.lse_TW[:, r], self.targets_T
        if w > 1:
            yield "counted w times", f"the sum times {w}", self.lse_T + math.log(w), self.targets_T
        if padding:
            yield "padding counted", f"{padding} columns", np.logaddexp(self.lse_T, math.log(padding)), self.targets_T
        for step in (1, -1):
            yield "target off by one", f"target {step:+d}", self.lse_T, (self.targets_T + step) % v

    def _what_if(self, what: str, lse_T: np.ndarray, targets_T: np.ndarray, rows_K: np.ndarray) -> np.ndarray:
        """Rows of an array, with another logsumexp and other targets."""
        target_TE, wrong_TE = self.table_VE[self.targets_T], self.table_VE[targets_T]
        if what in ("loss", "logprobs"):
            logprobs_T = np.where(self.counted_T, np.einsum("te,te->t", self.hidden_TE, wrong_TE) - lse_T, 0)
            return np.array([[-logprobs_T.sum() / self.count]]) if what == "loss" else logprobs_T[rows_K, None]
        # Probabilities are in another proportion; the part of the target is not.
        scale_T = np.exp(self.lse_T - lse_T)
        grad_TE = scale_T[:, None] * (self.values["hidden gradient"] + target_TE / self.count) - wrong_TE / self.count
        grad_TE[~self.counted_T] = 0
        if what == "hidden gradient":
            return grad_TE[rows_K]
        hidden_CE = self.hidden_TE[self.counted_T]
        p_CK = np.exp(hidden_CE @ self.table_VE[rows_K].T - lse_T[self.counted_T, None])
        p_CK -= targets_T[self.counted_T, None] == rows_K
        head_KE: np.ndarray = p_CK.T @ hidden_CE / self.count
        return head_KE + self._scatter(grad_TE)[rows_K] if self.case.tied else head_KE

    def _part_of_rank(self, rank: int, tokens_K: np.ndarray) -> np.ndarray:
        """Hidden gradient of some tokens, from one rank's columns."""
        columns = self.partition.owned_range(rank)
        rows_NE = self.table_VE[slice(*columns)]
        p = np.exp(self.hidden_TE[tokens_K] @ rows_NE.T - self.lse_T[tokens_K, None])
        p -= self.targets_T[tokens_K, None] == np.arange(*columns)
        return np.where(self.counted_T[tokens_K, None], p @ rows_NE / self.count, 0)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, nan=0, posinf=0)


def _rounding(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Largest error of rounding to ``dtype`` once, flushing included."""
    info = ml_dtypes.finfo(dtype)
    smallest = float(info.smallest_subnormal) / 2 + float(np.finfo(np.float32).smallest_normal)
    rounded: np.ndarray = np.abs(values) * (float(info.eps) / 2) + smallest
    return rounded
