"""``python -m benchmarks tables``: tables converted, beside ``cp``, and numbers made, beside NumPy and torch."""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.cases import warm_pages
from benchmarks.machine import describe, machine_facts
from shared.bits import DTYPES
from shared.global_normal import normal_rows
from shared.tables.tensor_file import header_bytes

__all__ = ["convert", "main", "numbers"]

_DESCRIPTION = """\
Measure the commands that convert tables, beside cp -r of the same bytes: alone, when the bytes may be in memory only, and
followed by sync, as the commands wait for the disk too. (cp neither computes checksums nor reads back what it wrote.) And
the numbers of init="global" beside NumPy's and torch's own.

All candidates in each round, in an order that changes; medians. Commands are timed as a whole, with Python's start. Before
each, memory is faulted in and freed, so that none profits from what the one before it left.

examples:
  python -m benchmarks tables
  python -m benchmarks tables --gigabytes 1 --rounds 3 --output results"""

_EMB_SIZE = 4096
_COUNT = 32 << 20


_COMMAND = """
import sys
from shared.cli import main
status = main([*sys.argv[1:], "--json"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
raise SystemExit(status)
"""


def _pve(*arguments: str) -> int:
    """Run a command; returns its peak memory in bytes."""
    command = [sys.executable, "-c", _COMMAND, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return int(done.stderr) * 1024


def convert(folder: Path, gigabytes: float, rounds: int, step: Callable[[], None] = lambda: None) -> dict[str, object]:
    """Seconds of each command on a table in bfloat16, as 8 parts, and the peak memory of any of them."""
    rows = int(gigabytes * 2**30) // (2 * _EMB_SIZE)
    source, parts, result = folder / "table.safetensors", folder / "parts", folder / "result"
    block = np.random.default_rng(0).integers(0, 2**16, 16 << 20, np.uint16).tobytes()
    with open(source, "wb") as file:
        file.write(header_bytes("embed_tokens.weight", "bfloat16", (rows, _EMB_SIZE), {}))
        left = rows * _EMB_SIZE * 2
        while left:
            left -= file.write(block[:left])
    padding = "--padded-vocab-size", "even"
    _pve("convert", str(source), str(parts), "--world-size", "8", *padding)
    source.unlink()
    from_parts = "convert", str(parts), "--vocab-size", str(rows)
    commands: dict[str, Callable[[], Any]] = {
        "cp -r": lambda: subprocess.run(["cp", "-r", str(parts), str(result)], check=True),
        "cp -r, then sync": lambda: subprocess.run(
            ["bash", "-c", 'cp -r "$0" "$1" && sync "$1"/*/*', str(parts), str(result)], check=True
        ),
        "pve convert, 8 parts to 6": lambda: _pve(*from_parts, str(result), "--world-size", "6", *padding),
        "pve convert, 8 parts to a file": lambda: _pve(*from_parts, f"{result}.safetensors"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    order, peak = random.Random(0), 0
    for number in range(rounds + 1):
        for name in order.sample(list(commands), len(commands)):
            os.sync()  # no one waits for what another left to be written
            warm_pages(rows * _EMB_SIZE * 2 + 2**28)
            started = time.perf_counter()
            result_of = commands[name]()
            if name.startswith("pve"):
                peak = max(peak, result_of)
            if number:  # the first round brings the files into memory
                seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(result, ignore_errors=True)
            Path(f"{result}.safetensors").unlink(missing_ok=True)
            step()
    return {"bytes": rows * _EMB_SIZE * 2, "seconds": seconds, "peak_bytes": peak}


def numbers(count: int, rounds: int, step: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Millions of normally distributed numbers a second, into memory that is there."""
    import torch

    columns = 1024
    memory = {name: np.zeros((count // columns, columns), DTYPES[name]) for name in ("float32", "bfloat16")}
    for array in memory.values():
        array.view(np.uint8).fill(1)
    tensor, generator = torch.zeros(count // columns, columns), np.random.Generator(np.random.Philox(0))

    def ours(name: str) -> None:
        normal_rows(0, count // columns, columns, DTYPES[name], 42, out=memory[name])

    candidates: dict[str, Callable[[], object]] = {
        'init="global", float32': lambda: ours("float32"),
        'init="global", bfloat16': lambda: ours("bfloat16"),
        "NumPy standard_normal, float32": lambda: generator.standard_normal(out=memory["float32"], dtype=np.float32),
        "torch normal_, float32": lambda: tensor.normal_(),
    }
    found: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(candidates), len(candidates)):
            started = time.perf_counter()
            candidates[name]()
            if number:
                found[name].append(count / columns * columns / (time.perf_counter() - started) / 1e6)
            step()
    return found


def _report(converted: dict[str, object], made: dict[str, list[float]], rounds: int) -> str:
    seconds: dict[str, list[float]] = converted["seconds"]  # type: ignore[assignment]
    size, peak = int(str(converted["bytes"])), int(str(converted["peak_bytes"]))
    alone, synced = (statistics.median(seconds[name]) for name in ("cp -r", "cp -r, then sync"))
    lines = [
        "# Tables",
        "",
        describe(machine_facts()),
        "",
        f"{rounds} rounds, medians.",
        "",
        f"A table of {size / 2**30:.1f} GiB in bfloat16, in 8 shards. Peak memory of any command: {peak / 1e6:.0f} MB.",
        "",
        "| | seconds | GB/s | speed / cp's | / cp's with sync |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = f"{alone / median:.2f} | {synced / median:.2f}"
        lines.append(f"| {name} | {median:.2f} | {size / median / 1e9:.2f} | {ratios} |")
    lines += ["", "| numbers, normally distributed | million a second |", "|---|--:|"]
    lines += [f"| {name} | {statistics.median(rates):.0f} |" for name, rates in made.items()]
    return "\n".join([*lines, ""])


def main() -> int:
    """Parse the command line, measure, show and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tables",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the table, in GiB (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the median counts")
    parser.add_argument("--folder", type=Path, help="where to put the tables (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args()
    console = Console()
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
    ):
        task = progress.add_task("tables", total=8 * (options.rounds + 1))
        converted = convert(Path(folder), options.gigabytes, options.rounds, lambda: progress.advance(task))
        made = numbers(_COUNT, options.rounds, lambda: progress.advance(task))
    text = _report(converted, made, options.rounds)
    console.print(text, markup=False)
    options.output.mkdir(parents=True, exist_ok=True)
    stored = {**machine_facts(), "converted": converted, "million_numbers_a_second": made}
    (options.output / "tables.json").write_text(json.dumps(stored, indent=1))
    (options.output / "tables.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
