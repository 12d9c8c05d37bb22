"""``python -m benchmarks head``: the output head's loss, forward and backward, beside its peers."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cases import shuffled, time_and_spread, timing
from benchmarks.machine import describe, machine_facts
from benchmarks.processes import measured

__all__ = ["main"]

_DESCRIPTION = """\
Measure the mean cross entropy of hidden states against a vocabulary table, forward and backward, beside its peers.

  torch, w=1: F.linear + F.cross_entropy, F.linear_cross_entropy (torch 2.13 and newer).
  torch, w=4: Megatron-core's vocab_parallel_cross_entropy after its parallel product; DTensor's loss_parallel; gloo.
  jax:        optax's loss of a dense product, the table split over the devices, left to the compiler.

Each of torch's candidates runs in fresh processes, in an order that changes; JAX's take turns in one. Medians. Memory is
that of one step beyond inputs and gradients: the resident peak on rank 0 for torch, the compiler's figure for JAX.
Apple's cut cross entropy and Liger's losses need a GPU and are left out.

examples:
  python -m benchmarks head
  python -m benchmarks head --large --rounds 1    (8192 tokens, 131072 x 1024: minutes and 14 GB for each peer)"""

_HEADER = ["case", "", "forward + backward", "/ ours", "memory", "MB sent per rank", "loss"]
_TORCH = {
    1: ["ours", "F.linear + F.cross_entropy", "F.linear_cross_entropy"],
    4: ["ours", "Megatron-core", "DTensor loss_parallel"],
}
_JAX = ["ours", "optax, GSPMD"]
_SMALL, _LARGE = (1024, 32768, 512), (8192, 131072, 1024)


def _torch_case(spec: dict[str, Any], turns: int) -> dict[str, Any]:
    names = _TORCH[spec["world_size"]]
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(turns):
        for place in shuffled(len(names), turn):
            name = names[place]
            asked = {**spec, "candidate": name, "memory": turn == 0}
            found[name].append(measured("torch_head", asked, name, ranks=spec["world_size"]))
    merged = {}
    for name, runs in found.items():
        times = timing("forward_backward", [t for run in runs for t in run["times"]])
        first = runs[0]
        merged[name] = {
            **times,
            "memory": first["peak_bytes"],
            "sent_bytes": first["sent_bytes"],
            "loss": first["loss"],
        }
    return merged


def _jax_case(spec: dict[str, Any]) -> dict[str, Any]:
    found = measured("jax_head", {**spec, "candidates": _JAX}, "jax's heads")
    return {
        name: {**timing("forward_backward", run["times"]), "memory": run["temporary_bytes"], "loss": run["loss"]}
        for name, run in found.items()
    }


def _rows(title: str, found: dict[str, Any]) -> list[list[str]]:
    ours = found["ours"]["forward_backward"]
    return [
        [
            title if name == "ours" else "",
            name,
            time_and_spread(run, "forward_backward"),
            f"{run['forward_backward'] / ours:.2f}",
            f"{run['memory'] / 2**20:.1f} MiB",
            f"{run['sent_bytes'] / 1e6:.1f}" if not math.isnan(run.get("sent_bytes", math.nan)) else "",
            f"{run['loss']:.6f}",
        ]
        for name, run in found.items()
    ]


def main() -> int:
    """Parse the command line, measure, show and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks head", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="8192 tokens and a table of 131072 x 1024")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("TOKENS", "ROWS", "COLUMNS"), help="other sizes")
    parser.add_argument("--only", choices=["torch", "jax"], help="one framework")
    parser.add_argument("--rounds", type=int, default=5, help="measurements in each process")
    parser.add_argument("--turns", type=int, default=2, help="fresh starts of torch's processes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/head.md"), help="the Markdown file")
    options = parser.parse_args()
    if min(options.rounds, options.turns) < 1:
        parser.error(f"--rounds and --turns must be at least 1, got {options.rounds} and {options.turns}")
    tokens, vocab_size, emb_size = options.sizes or (_LARGE if options.large else _SMALL)
    sizes = {"tokens": tokens, "vocab_size": vocab_size, "emb_size": emb_size, "rounds": options.rounds}
    cases = [
        (framework, {**sizes, "world_size": world_size, "dtype": "float32"})
        for framework in ("torch", "jax")
        if options.only in (None, framework)
        for world_size in (1, 4)
    ]
    console, facts = Console(width=180, soft_wrap=True), machine_facts()
    table = Table(*_HEADER, title="The output head")
    lines = ["| " + " | ".join(_HEADER) + " |", "|---|---|" + "--:|" * (len(_HEADER) - 2)]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("output head", total=len(cases))
        for framework, spec in cases:
            found = _torch_case(spec, options.turns) if framework == "torch" else _jax_case(spec)
            title = f"{framework}, w={spec['world_size']}, {tokens} tokens, {vocab_size} x {emb_size} float32"
            for row in _rows(title, found):
                table.add_row(*row)
                lines.append("| " + " | ".join(row) + " |")
            table.add_section()
            progress.advance(task)
    console.print(table)
    notes = "Memory of one step beyond inputs and gradients. torch: resident, on rank 0. JAX: the compiler's figure."
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(["# The output head", "", describe(facts), "", notes, "", *lines]) + "\n")
    console.print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
