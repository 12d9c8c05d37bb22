"""``python -m benchmarks``: run the measurements, and write them as JSON and Markdown."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.cases import Case, traffic

__all__ = ["main"]

_DESCRIPTION = """\
Measure the exchanges of both layers beside their peers: in one run, all candidates in each
round, in an order that changes, and medians.

  torch: Megatron-core's VocabParallelEmbedding and DTensor's RowwiseParallel, w gloo processes on this machine.
         (pip install --no-deps megatron-core==0.16.1; without it, Megatron is left out)
  JAX:   a masked lookup with psum or psum_scatter, and jnp.take left to the compiler with every layout pinned,
         w devices of this machine.

Before each measurement memory is faulted in and freed, so that no candidate profits from what the one before it left.

examples:
  python -m benchmarks --quick
  python -m benchmarks --only jax --output results"""

_ROOT = Path(__file__).parents[1]
_PEERS = {"torch": ["Megatron-core", "DTensor"], "jax": ["psum", "GSPMD"]}
_LARGE = (4, 2048)


def _cases(quick: bool) -> dict[str, list[Case]]:
    def cases(world_sizes: tuple[int, ...], *shapes: tuple[int, int]) -> list[Case]:
        return [
            Case(reduction, w, ids, *shape)
            for w in world_sizes
            for reduction in ("reduce_scatter", "all_reduce")
            for ids in ("zipf", "uniform")
            for shape in shapes
        ]

    if quick:
        return {"torch": cases((4,), _LARGE), "jax": cases((8,), _LARGE)}
    return dict.fromkeys(("torch", "jax"), cases((2, 4, 8), _LARGE, (1, 64), (1, 512)))


def _run(framework: str, cases: list[Case], candidates: list[str], rounds: int, progress: Progress) -> list[Any]:
    """The result of each case; all of one number of ranks in the same processes."""
    world_size = cases[0].world_size
    spec = json.dumps({"cases": [case.as_json() for case in cases], "candidates": candidates, "rounds": rounds})
    task = progress.add_task(f"{framework}, w={world_size}", total=len(cases) * (rounds + 1))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        result = Path(folder) / "result.json"
        if framework == "jax":
            commands = [[sys.executable, "-m", "benchmarks.jax_exchange", spec, str(result)]]
        else:
            command = [sys.executable, "-m", "benchmarks.torch_exchange", f"{folder}/rendezvous"]
            commands = [[*command, str(rank), spec, str(result)] for rank in range(world_size)]
        errors = [files.enter_context(open(f"{folder}/{number}.err", "w+")) for number in range(len(commands))]
        processes = [
            files.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, text=True, cwd=_ROOT))
            for command, error in zip(commands, errors, strict=True)
        ]
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith('{"done"'):
                progress.advance(task)
        for process, error in zip(processes, errors, strict=True):
            if process.wait() != 0:
                error.seek(0)
                raise RuntimeError(f"a {framework} process failed:\n{error.read()[-2000:]}")
        return list(json.loads(result.read_text()))


def _rows(case: Case, found: dict[str, dict[str, float]]) -> list[list[str]]:
    """A line per candidate: times, how many times slower than our automatic choice, and bytes."""
    ours = found["ours, auto"]
    rows = []
    for name, times in found.items():
        row = [str(case) if name == "ours, auto" else "", name]
        for key in ("forward", "forward_backward"):
            row += [f"{times[key] * 1e3:.1f}", f"{times[key] / ours[key]:.2f}"]
        rows.append([*row, f"{times['sent_bytes'] / 1e6:.1f}" if "sent_bytes" in times else ""])
    return rows


_HEADER = ["case", "", "forward, ms", "/ ours", "forward + backward, ms", "/ ours", "MB sent per rank"]


def main() -> int:
    """Parse the command line, measure, show and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="w=4 for torch and w=8 for JAX, large batches only")
    parser.add_argument("--only", choices=["torch", "jax"], help="one framework")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args()
    console, results = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for framework, cases in _cases(options.quick).items():
            if options.only not in (None, framework):
                continue
            peers = [
                name
                for name in _PEERS[framework]
                if name != "Megatron-core" or importlib.util.find_spec("megatron") is not None
            ]
            candidates = ["ours, auto", "ours, routed", "ours, dense", *peers]
            for w in sorted({case.world_size for case in cases}):
                group = [case for case in cases if case.world_size == w]
                for case, found in zip(
                    group, _run(framework, group, candidates, options.rounds, progress), strict=True
                ):
                    results.append((framework, case, found))
    lines = []
    for framework in dict.fromkeys(name for name, _, _ in results):
        table = Table(title=framework)
        for heading in _HEADER:
            table.add_column(heading)
        lines += [f"## {framework}", "", "| " + " | ".join(_HEADER) + " |", "|---|---|--:|--:|--:|--:|--:|"]
        for name, case, found in results:
            if name == framework:
                for row in _rows(case, found):
                    table.add_row(*row)
                    lines.append("| " + " | ".join(row) + " |")
                table.add_section()
        console.print(table)
        lines.append("")
    options.output.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    stored = [
        {"framework": name, "case": case.as_json(), "must_send_bytes": traffic(case), "found": found}
        for name, case, found in results
    ]
    (options.output / "exchange.json").write_text(json.dumps({**machine, "results": stored}, indent=1))
    heading = f"# The exchanges\n\n{os.cpu_count()} CPUs, {platform.machine()}, {options.rounds} rounds, medians.\n\n"
    (options.output / "exchange.md").write_text(heading + "\n".join(lines))
    console.print(f"written to {options.output}/exchange.json and exchange.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
