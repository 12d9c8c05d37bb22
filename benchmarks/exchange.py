"""The measurements of the exchanges: which cases, and what is to be reached in them."""

import math
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case, time_and_spread

__all__ = ["HEADER", "OWN_IDS", "SCALING", "TURNS", "exchange_cases", "own_ids_cases", "rows_of", "targets"]

HEADER = [
    "case",
    "",
    "forward",
    "/ ours",
    "forward + backward",
    "/ ours",
    "MB sent per rank",
    "and backward",
    "peak MB",
]

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


OWN_IDS = """\
Each rank passes ids of its own and gets their rows; 8192 ids in all, however many ranks there are. torch's `auto` is routed,
JAX's is dense. MB sent: counted on the loopback, of all processes together, divided by their number, of the forward and of
forward and backward. *peak MB*: how much a process has at most more than the table in a step, its output and the gradient
included. Times are medians, with half the distance of the quartiles. Each of torch's candidates runs in fresh processes, and
its rows and its gradient have been compared with what they must be.

- `FSDP2` is `fully_shard` of an `nn.Embedding`: the whole table is gathered and its whole gradient reduce-scattered.
- `torchrec` is its row-wise sharding with the fused kernel. Its backward is a step of SGD on the rows that occur, not a
  gradient. `ours, sparse` makes a sparse gradient of these rows, the others a dense one.
- `GSPMD` is `jnp.take` with the table and the ids split over the same axis, all layouts pinned.
"""
"""What is what in the results of all_to_all."""


def own_ids_cases() -> dict[str, list[Case]]:
    """The cases of all_to_all by framework: a row of the ids for each rank, as many ids in all over 2, 4 and 8 ranks."""
    tokens = math.prod(_LARGE)
    found = [Case("all_to_all", w, ids, w, tokens // w) for w in (4, 2, 8) for ids in ("zipf", "uniform")]
    return {"torch": found, "jax": [case for case in found if case.world_size == 4]}


def rows_of(case: Case, found: dict[str, dict[str, float]]) -> list[list[str]]:
    """A line per candidate: times, how many times slower than our automatic choice, bytes sent, and memory."""
    ours = next(iter(found.values()))
    rows = []
    for name, times in found.items():
        row = [str(case) if times is ours else "", name]
        for key in ("forward", "forward_backward"):
            row += [time_and_spread(times, key), f"{times[key] / ours[key]:.2f}"]
        counted = ("sent_bytes", "sent_bytes_with_backward", "peak_extra_bytes")
        rows.append([*row, *(f"{times[key] / 1e6:.1f}" if key in times else "" for key in counted)])
    return rows


_AT_LEAST = {
    ("all_reduce", "forward"): {"Megatron-core": 1.0, "DTensor": 1.0},
    ("all_reduce", "forward_backward"): {"Megatron-core": 2.0, "DTensor": 2.0},
    ("all_to_all", "forward"): {},
    ("all_to_all", "forward_backward"): {"FSDP2": 3.0},
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
