"""``python -m benchmarks readme``: put what is in ``benchmarks/results`` into README, docs and figures."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.local import Result
from benchmarks.machine import describe
from benchmarks.plots import draw_exchange, draw_local

__all__ = ["PAGES", "main", "tables", "with_tables"]

_ROOT = Path(__file__).parents[1]

PAGES = [_ROOT / "README.md", _ROOT / "docs" / "performance.md"]
"""The pages with tables."""
_NAMES = {
    "ours": "**this layer**",
    "ours, auto": "**this layer**",
    "ours, dense": 'the same, `exchange="dense"`',
    "ours, routed": 'the same, `exchange="routed"`',
    "ours, sparse": "the same, `sparse=True`",
    "ours, moved table": "this layer after `.to()`",
    "ours, plain": "this layer, the plain way",
    "ours, all_reduce": "**this layer, all_reduce**",
    "Megatron-core": "Megatron-core 0.16.1 `VocabParallelEmbedding`",
    "DTensor": "DTensor `RowwiseParallel`",
    "FSDP2": "FSDP2, `fully_shard(nn.Embedding)`",
    "torchrec": "torchrec row-wise, its SGD in backward",
    "psum": "masked lookup, then `psum` or `psum_scatter`",
}
_LARGE = [("uniform", "float32"), ("zipf", "float32"), ("uniform", "bfloat16"), ("zipf", "bfloat16")]
_TOKENS = (1, 64, 512, 2048)
_IDS, _RANKS = ("zipf", "uniform"), (2, 4, 8)
_OF_A_STEP = ("sent_bytes_with_backward", "peak_extra_bytes")


def _results(name: str) -> list[dict[str, Any]]:
    return list(json.loads((_ROOT / f"benchmarks/results/{name}.json").read_text())["results"])


def _found(results: list[dict[str, Any]], framework: str, case: Case) -> dict[str, dict[str, float]]:
    return next(each["found"] for each in results if each["framework"] == framework and Case(**each["case"]) == case)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    for name, *cells in rows:
        bold = name.startswith("**")
        shown = [f"**{cell}**" if bold and cell else cell for cell in cells]
        lines.append("| " + " | ".join([name, *shown]) + " |")
    return "\n".join(lines)


def _side_by_side(
    found: list[dict[str, dict[str, float]]], left_out: tuple[str, ...], floor: str, kinds: tuple[str, ...]
) -> list[list[str]]:
    """A row for each candidate, and in it the times of each case."""
    names = {**_NAMES, "floor": floor}
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        if name not in left_out:
            cells = [" / ".join(_ms(each[name][kind]) for kind in kinds) if name in each else "" for each in found]
            rows.append([names.get(name, name), *cells])
    return rows


def _own_ids(framework: str, found: list[dict[str, dict[str, float]]]) -> list[list[str]]:
    """A row for each candidate of all_to_all: the times of each case; of the first, bytes of a step and memory."""
    rows = _side_by_side(found, (), "", ("forward", "forward_backward"))
    rows[0][0] = f"**{framework}, w=4, all_to_all**"
    for row, each in zip(rows, found[0].values(), strict=True):
        row += [f"{each[key] / 1e6:.1f}" if key in each else "" for key in _OF_A_STEP]
    return rows


def _by_ranks(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each of torch's candidates: bytes that a rank sends in a step / its peak memory, at each number of ranks."""
    found = [_found(results, "torch", Case("all_to_all", w, "uniform", w, 8192 // w)) for w in _RANKS]
    return [
        [_NAMES.get(name, name), *(" / ".join(f"{each[name][key] / 1e6:.1f}" for key in _OF_A_STEP) for each in found)]
        for name in found[0]
    ]


def _markdown(name: str) -> str:
    """The table of a result that is stored as Markdown alone."""
    lines = (_ROOT / f"benchmarks/results/{name}.md").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def tables() -> dict[str, str]:
    """By the name of their mark."""
    local, exchange = _results("local"), _results("exchange")
    both = ("forward", "forward_backward")
    headers = [f"{dtype}, {ids} ids" for ids, dtype in _LARGE]
    large = [Case("none", 8, ids, dtype=dtype) for ids, dtype in _LARGE]
    torch = [_found(local, "torch", case) for case in large]
    jax = [_found(local, "jax", case) for case in large[:3]]
    few = [_found(local, "torch", Case("none", 8, "uniform", 1, tokens)) for tokens in _TOKENS]
    micro = [_found(local, "torch", Case("accumulate", 1, ids, 1)) for ids in ("uniform", "zipf")]
    in_us = [
        [_NAMES.get(name, name), *(f"{each[name]['forward'] * 1e6:.0f}" for each in few)]
        for name in few[0]
        if name not in ("floor", "zeros")
    ]
    of_exchange = []
    for framework, w in (("torch", 4), ("jax", 8)):
        for reduction in ("reduce_scatter", "all_reduce"):
            found = [_found(exchange, framework, Case(reduction, w, ids)) for ids in ("zipf", "uniform")]
            rows = _side_by_side(found, ("ours, routed",), "", both)
            rows[0][0] = f"**{framework}, w={w}, {reduction}**"
            sent = [each.get("sent_bytes") for name, each in found[0].items() if name != "ours, routed"]
            of_exchange += [
                [*row, "" if count is None else f"{count / 1e6:.1f}"] for row, count in zip(rows, sent, strict=True)
            ]
    own_ids = [
        row
        for framework in ("torch", "jax")
        for row in _own_ids(
            framework, [_found(_results("all_to_all"), framework, Case("all_to_all", 4, ids)) for ids in _IDS]
        )
    ]
    best = [_found(exchange, "torch", Case(reduction, 4, "zipf")) for reduction in ("reduce_scatter", "all_reduce")]
    three = [
        [f"one of 8 ranks, no reduction, {dtype}", torch[number]["ours"], torch[number]["Megatron's form"], None]
        for number, dtype in ((3, "bfloat16"),)
    ] + [
        [f"{reduction} over 4 ranks, float32", found["ours, auto"], found["Megatron-core"], found["DTensor"]]
        for reduction, found in zip(("reduce_scatter", "all_reduce"), best, strict=True)
    ]
    return {
        "three": _table(
            ["forward + backward, Zipf ids", "this layer", "Megatron-core", "DTensor"],
            [[name, *("" if f is None else _ms(f["forward_backward"]) for f in found)] for name, *found in three],
        ),
        "torch": _table(["", *headers], _side_by_side(torch, ("zeros",), "a clone; allocating both", both)),
        "jax": _table(["", *headers[:3]], _side_by_side(jax, ("one-hot matmul",), "a gather without a mask", both)),
        "few": _table(["tokens", *map(str, _TOKENS)], in_us),
        "accumulation": _table(
            ["", "uniform ids", "zipf ids"],
            _side_by_side(micro, (), "copying the tokens' rows twice", ("forward_backward",)),
        ),
        "head": _markdown("head"),
        "own_ids": _table(["", "zipf ids", "uniform ids", "MB sent per rank, zipf", "peak MB, zipf"], own_ids),
        "own_ids_by_ranks": _table(["uniform ids", *(f"w={w}" for w in _RANKS)], _by_ranks(_results("all_to_all"))),
        "exchange": _table(["", "zipf ids", "uniform ids", "MB sent per rank, zipf"], of_exchange),
    }


def with_tables(text: str) -> str:
    """The page with each table where its mark is."""
    known = tables()
    for name in re.findall(r"<!-- measured: (\w+) -->", text):
        mark = f"<!-- measured: {name} -->\n\n"
        pattern = re.compile(re.escape(mark) + r"(?:\|[^\n]*\n)*\n*")
        text = pattern.sub(lambda _, new=f"{mark}{known[name]}\n\n": new, text)  # type: ignore[misc]
    return text


def main() -> int:
    """Write the pages and the figures anew."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    draw(_ROOT / "benchmarks" / "results")
    return 0


def draw(folder: Path) -> None:
    """Draw the figures of the results in a folder."""
    stored = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("local", "exchange")}
    title = {name: describe({k: v for k, v in each.items() if k != "results"}) for name, each in stored.items()}
    local = [Result(r["framework"], Case(**r["case"]), r["found"]) for r in stored["local"]["results"]]
    exchange = [(f"{r['framework']}, {Case(**r['case'])}", r["found"]) for r in stored["exchange"]["results"]]
    draw_local(local, folder / "local.png", title["local"].partition(". ")[0])
    draw_exchange(exchange, folder / "exchange.png", title["exchange"].partition(". ")[0])


if __name__ == "__main__":
    sys.exit(main())
