"""The measurements of the exchanges: which cases, and what is to be reached in them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case, time_and_spread

__all__ = ["HEADER", "SCALING", "TURNS", "exchange_cases", "rows_of", "targets"]

HEADER = ["case", "", "forward", "/ ours", "forward + backward", "/ ours", "MB sent per rank"]

TURNS = 3
"""How often each candidate's processes are started anew, in an order that changes."""

_LARGE = (4, 2048)

SCALING = [
    Case("reduce_scatter", w, "zipf", 4, 8192, vocab_size=131072, emb_size=512, dtype="bfloat16") for w in (8, 64, 512)
]
"""One rank's own cost as the number of ranks grows."""


def exchange_cases(quick: bool) -> dict[str, list[Case]]:
    """The cases by framework."""

    def cases(world_sizes: tuple[int, ...], *shapes: tuple[int, int]) -> list[Case]:
        return [
            Case(reduction, w, ids, *shape)
            for w in world_sizes
            for reduction in ("reduce_scatter", "all_reduce")
            for ids in ("zipf", "uniform")
            for shape in shapes
        ]

    both = [replace(case, dtype=dtype) for case in cases((4,), _LARGE) for dtype in ("float32", "bfloat16")]
    if quick:
        return {"torch": both, "jax": cases((8,), _LARGE)}
    more = [case for case in cases((2, 4, 8), _LARGE, (1, 64), (1, 512)) if case not in both]
    return {"torch": [*both, *more], "jax": cases((2, 4, 8), _LARGE, (1, 64), (1, 512))}


def rows_of(case: Case, found: dict[str, dict[str, float]]) -> list[list[str]]:
    """A line per candidate: times, how many times slower than our automatic choice, and bytes."""
    ours = next(iter(found.values()))
    rows = []
    for name, times in found.items():
        row = [str(case) if times is ours else "", name]
        for key in ("forward", "forward_backward"):
            row += [time_and_spread(times, key), f"{times[key] / ours[key]:.2f}"]
        rows.append([*row, f"{times['sent_bytes'] / 1e6:.1f}" if "sent_bytes" in times else ""])
    return rows


_AT_LEAST = {
    ("all_reduce", "forward"): {"Megatron-core": 1.0, "DTensor": 1.0},
    ("all_reduce", "forward_backward"): {"Megatron-core": 2.0, "DTensor": 2.0},
    ("reduce_scatter", "forward"): {"Megatron-core": 4.0, "DTensor": 2.5},
    ("reduce_scatter", "forward_backward"): {"Megatron-core": 5.0, "DTensor": 5.0},
}
"""How many times as fast as a peer a large batch over four ranks is to be."""


def targets(results: list[tuple[str, Case, Any]]) -> list[list[str]]:
    """A line for each thing that is to be reached: where, what, how much was found, what it is to be, and whether it is."""
    rows = []
    for framework, case, found in results:
        if framework != "torch" or case.world_size != 4 or (case.batch, case.sequence) != _LARGE:
            continue
        for kind in ("forward", "forward_backward"):
            for peer, least in _AT_LEAST[case.reduction, kind].items():
                times = [found.get(name, {}).get(kind, math.nan) for name in (peer, "ours, auto")]
                ratio = times[0] / times[1]
                if not math.isnan(ratio):
                    verdict = "met" if ratio >= least else "missed"
                    what = f"{kind.replace('_', ' + ')}: times as fast as {peer}"
                    rows.append([f"{framework}: {case}", what, f"{ratio:.2f}", f"{least:.2f}", verdict])
    return rows
