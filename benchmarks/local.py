"""The measurements of one rank's lookup: which cases, and what is to be reached in them."""

import math
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cases import Case, time_and_spread

__all__ = ["HEADER", "WHAT_IS_WHAT", "Result", "local_cases", "reasons", "rows_of", "targets"]

HEADER = ["case", ""]
HEADER += [text for kind in ("forward", "backward", "forward + backward") for text in (kind, "/ floor", "/ ours")]
HEADER += ["step with SGD", "with Adam", "extra peak, MB"]
_BASE = Case("none", 8, "uniform")
_SMALL = Case("none", 4, "uniform", 1, vocab_size=32000, emb_size=256, dtype="bfloat16")
_TOKENS = (1, 64, 512, 2048, 8)


@dataclass(frozen=True)
class Result:
    """What was found of a case.

    Attributes:
        framework: ``"torch"``, ``"torch on a GPU"`` or ``"jax"``.
        case: what was measured.
        found: by candidate, seconds and bytes; ``"floor"`` is among them.
    """

    framework: str
    case: Case
    found: dict[str, dict[str, float]]

    def ratio(self, kind: str, name: str, over: str) -> float:
        """How many times as long ``name`` takes as ``over``; NaN where one of them was not measured."""
        times = [self.found.get(which, {}).get(kind, math.nan) for which in (name, over)]
        return times[0] / times[1]


def local_cases(quick: bool) -> dict[str, list[Case]]:
    """The cases by framework: a base, and from it each axis by itself."""
    ids, dtypes = ("uniform", "zipf"), ("float32", "bfloat16")
    base = [replace(_BASE, ids=kind, dtype=dtype) for kind in ids for dtype in dtypes]
    few = [replace(_BASE, ids=kind, batch=1, sequence=tokens) for kind in ids for tokens in _TOKENS]
    micro = [replace(_BASE, reduction="accumulate", world_size=1, ids=kind, batch=1) for kind in ids]
    tiny = [replace(_BASE, vocab_size=64, emb_size=16, world_size=1, dtype="bfloat16", batch=1, sequence=64)]
    if quick:
        small = [replace(_SMALL, ids="zipf", sequence=512)]
        return {"torch": [*base, *few[:4], *micro, *small, *tiny], "jax": [base[0], base[2], base[1], few[1]]}
    more: list[dict[str, Any]] = [
        {"vocab_size": 32768},
        {"vocab_size": 1048576},
        {"emb_size": 256},
        {"emb_size": 8192, "batch": 1},
        *({"world_size": w} for w in (1, 2, 4, 16)),
        {"batch": 32},
    ]
    small = [replace(_SMALL, ids=kind, sequence=tokens) for kind in ids for tokens in (8, 64, 512, 8192)]
    few16 = [replace(_BASE, dtype="bfloat16", batch=1, sequence=tokens) for tokens in _TOKENS]
    every = [*base, *few, *few16, *(replace(_BASE, ids=kind, **change) for kind in ids for change in more)]
    # On one machine JAX's devices hold the whole table and w outputs: what needs more than it has is left out.
    return {"torch": [*every, *small, *tiny, *micro], "jax": [case for case in every if _jax_bytes(case) < 4e9]}


def _jax_bytes(case: Case) -> float:
    table = case.vocab_size * case.emb_size * case.itemsize
    return 3 * table + 2 * case.world_size * case.batch * case.sequence * case.emb_size * case.itemsize


def rows_of(result: Result) -> list[list[str]]:
    """A line for each candidate."""
    rows = []
    for name, times in result.found.items():
        row = [str(result.case) if name == "ours" else "", name]
        for kind in ("forward", "backward", "forward_backward"):
            ratios = [f"{result.ratio(kind, name, over):.2f}" for over in ("floor", "ours")]
            row += [time_and_spread(times, kind), *ratios] if kind in times else ["", "", ""]
        row += [time_and_spread(times, kind) if kind in times else "" for kind in ("sgd_step", "adam_step")]
        rows.append([*row, f"{times['peak_extra_bytes'] / 1e6:.1f}"])
    return rows


def _of_torch(result: Result) -> list[tuple[str, float, float]]:
    """What is compared, what was found and what it may be at most."""
    megatron, null_row = "Megatron's form", "TGI's null row"
    case, tokens = result.case, result.case.batch * result.case.sequence
    if case.reduction == "accumulate":
        plain = result.ratio("forward_backward", "ours", "ours, plain")
        return [("a micro-batch / the plain way", plain, 1 / 5)]
    small = case.dtype == "bfloat16" and case.vocab_size * case.emb_size < 2**24
    large = tokens >= 8192 and not small
    both = 1.5 if small else 0.6 if large else 1.0
    return [
        (f"forward / {megatron}", result.ratio("forward", "ours", megatron), 0.75 if large else 1.0),
        (f"forward / {null_row}", result.ratio("forward", "ours", null_row), 1.1 if large else 1.25),
        (f"forward + backward / {megatron}", result.ratio("forward_backward", "ours", megatron), both),
    ]


def _of_gpu(result: Result) -> list[tuple[str, float, float]]:
    """Bytes a second against those of a copy: a lookup reads a row for each token that is owned, and writes one for all."""
    tokens = result.case.batch * result.case.sequence
    if tokens < 8192:
        return []
    moved = (tokens + result.found["ours"]["owned_tokens"]) / (2 * tokens)
    return [("time / that of copying as many bytes", result.ratio("forward", "ours", "floor") / moved, 1 / 0.85)]


def _of_jax(result: Result) -> list[tuple[str, float, float]]:
    ours, peer = "ours, all_reduce", "jnp.take, GSPMD"
    return [
        ("partial forward / an unsharded take", result.ratio("forward", "ours", "floor"), 1.15),
        ("all_reduce forward / GSPMD", result.ratio("forward", ours, peer), 1.0),
        ("all_reduce forward + backward / GSPMD", result.ratio("forward_backward", ours, peer), 1.0),
    ]


WHAT_IS_WHAT = """\
- `none, w=8, 131072 x 1024 float32, 4 x 2048 uniform ids`: one of 8 ranks of a table of 131072 rows and 1024 columns looks
  4 x 2048 ids up, uniformly distributed, and returns its incomplete embedding. With Zipf ids (id i with probability
  1 / (i + 1)) it is rank 0, which owns most of them; else a rank in the middle. `accumulate`: the whole table on one rank,
  and a gradient that is there already, to which each micro-batch adds.
- The peers are forms of a lookup in our own words: Megatron's (mask, lookup, masked assignment; and its deterministic
  variant, which indexes), vLLM's (`masked_fill_`), TGI's (one more row of zeros in the table, where foreign ids are sent),
  torchtitan's (times the mask), `embedding_bag` of owned ids; and PyTorch's own `nn.Embedding`, which has no foreign ids.
- `ours, moved table`: this layer on memory without a row of zeros behind it, as after `.to()`.
- A copy of the output is called floor, and with backward the allocation, in zeros, of output and gradient; where a gradient
  is added to one that is there, two copies of the tokens' rows. It is no lower bound: from 32 MiB on our output is in huge
  pages and our gradient in memory that is there once it is touched. `zeros`: the output in zeros.
- A step is forward, backward and the optimizer's step, each by itself with a parameter of its own or the shared one.
- Sums of 16-bit gradients are float32 here and 16-bit in the peers' forms.
- Times are medians, with half the distance of the quartiles; forward is without a graph. extra peak: resident memory.
- Targets at most 1.00 are another's time: met up to 1.05, as two runs of one program differ by so much.
"""


_REASONS = {
    "TGI's null row": "Both copy the same rows, in the same number of operations; ours also checks the ids' dtype and that "
    "the row of zeros is still the table's, some 3 us a call.",
    "Megatron's form": "16-bit gradients are added in float32; Megatron's form adds in 16 bits, and loses what is small "
    "beside the sum.",
    "the plain way": "A micro-batch costs its tokens, the plain way a pass over the table.",
    "GSPMD": "Ours adds integers, of which no bit is lost, and turns them into numbers again: a pass that XLA:CPU does not "
    "leave out where nothing follows that it could be a part of.",
}
"""By what is compared with, why a target is missed where it is."""


def reasons(rows: list[list[str]]) -> list[str]:
    """Why targets are missed, for those of ``targets`` that are."""
    missed = [what.partition(" / ")[2] or what for _, what, *_, verdict in rows if verdict == "missed"]
    return [f"- {name}: {text}" for name, text in _REASONS.items() if any(name in what for what in missed)]


def targets(results: list[Result]) -> list[list[str]]:
    """A line for each thing that is to be reached: where, what, how much was found and allowed, and whether it is met.

    A twentieth above the limit still counts as met where the limit is a peer's own time: that much two runs differ.
    """
    rows = []
    for result in results:
        of = {"torch": _of_torch, "jax": _of_jax, "torch on a GPU": _of_gpu}[result.framework]
        for what, found, limit in of(result):
            if math.isnan(found):
                continue
            allowed = limit * 1.05 if limit == 1.0 else limit
            verdict = "met" if found <= allowed else "missed"
            rows.append([f"{result.framework}: {result.case}", what, f"{found:.2f}", f"{limit:.2f}", verdict])
    return rows
