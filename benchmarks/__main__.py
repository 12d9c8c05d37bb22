"""``python -m benchmarks``: run the measurements, and write them as JSON, Markdown and figures."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.cases import Case, shuffled, timing, traffic
from benchmarks.exchange import HEADER as EXCHANGE_HEADER
from benchmarks.exchange import OWN_IDS, SCALING, TURNS, exchange_cases, own_ids_cases
from benchmarks.exchange import rows_of as exchange_rows
from benchmarks.exchange import targets as exchange_targets
from benchmarks.local import HEADER, WHAT_IS_WHAT, Result, local_cases, reasons, rows_of, targets
from benchmarks.machine import NO_GPU, describe, machine_facts
from benchmarks.plots import draw_exchange, draw_local
from benchmarks.processes import ROOT, measured

__all__ = ["main"]

_DESCRIPTION = """\
Measure both layers beside their peers and beside what the memory allows: in one run, all candidates in each
round, in an order that changes, and medians.

  local:    one rank's lookup. torch: the forms of Megatron, vLLM, TGI, torchtitan, embedding_bag; the floor is a clone
            of the output, and with backward the allocation of output and gradient. JAX, w devices of this machine: a
            gather without any mask (the floor), GSPMD, flax.nnx.Embed, Explicit .at[].get; one-hot where it is small.
  exchange: the reductions. torch: Megatron-core's VocabParallelEmbedding and DTensor's RowwiseParallel, w gloo
            processes, started anew for each candidate; and one rank's own cost at w = 8, 64, 512. JAX: a masked
            lookup with psum or psum_scatter, and jnp.take with every layout pinned.
  all_to_all: each rank its own ids. torch: FSDP2, which gathers the table, and torchrec's row-wise sharding; JAX:
            jnp.take with the table and the ids split over the same axis.

Others, each with a --help of its own:
  python -m benchmarks head:   the output head's loss beside its peers.
  python -m benchmarks tables: tables converted in files, and numbers made.
  python -m benchmarks aot:    what the compilers of TPUs and GPUs make of the JAX layer.
  python -m benchmarks readme: the tables and figures of the documentation, from the results.

Peers that are not installed are left out:
  pip install -c constraints.txt -e '.[all,bench]'; pip install --no-deps megatron-core==0.16.1
  pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 tensordict torchmetrics==1.0.3 lightning-utilities \
    pyre-extensions typing-inspect pyvers cloudpickle iopath portalocker tabulate tqdm
Before each measurement memory is faulted in and freed, so that no candidate profits from what the one before it left.
Each candidate's output is compared with NumPy's before it is timed.

examples:
  python -m benchmarks --quick
  python -m benchmarks --only jax --part exchange --output results"""

_OTHERS = ("aot", "head", "readme", "tables")
_PEERS = {"torch": ["Megatron-core", "DTensor"], "jax": ["psum", "GSPMD"]}
_WIDTH = 230


def _run_jax(cases: list[Case], candidates: list[str], rounds: int, progress: Progress) -> list[Any]:
    """JAX's exchanges, all cases of one number of devices in the same process, all candidates in turn."""
    spec = {"cases": [case.as_json() for case in cases], "candidates": candidates, "rounds": rounds}
    task = progress.add_task(f"jax, exchanges, w={cases[0].world_size}", total=len(cases) * (rounds + 1))
    return list(measured("jax_exchange", spec, "jax's exchanges", lambda: progress.advance(task)))


def _run_torch(cases: list[Case], candidates: list[str], rounds: int, turns: int, progress: Progress) -> list[Any]:
    """PyTorch's exchanges, each candidate in fresh processes of its own, in an order that changes by turn."""
    task = progress.add_task("torch, exchanges", total=len(cases) * len(candidates) * turns)
    results = []
    for case in cases:
        calls: dict[str, list[Any]] = {name: [] for name in candidates}
        for turn in range(turns):
            for place in shuffled(len(candidates), turn):
                name = candidates[place]
                spec = {"case": case.as_json(), "candidate": name, "rounds": rounds}
                calls[name].append(measured("torch_exchange", spec, f"{name}, {case}", ranks=case.world_size))
                progress.advance(task)
        results.append({name: _merged(found) for name, found in calls.items()})
    return results


def _merged(found: list[Any]) -> dict[str, float]:
    times = {kind: [t for each in found for t in each[kind]] for kind in ("forward", "forward_backward")}
    return (
        timing("forward", times["forward"])
        | timing("forward_backward", times["forward_backward"])
        | {key: found[0][key] for key in ("sent_bytes", "sent_bytes_with_backward", "peak_extra_bytes")}
    )


def _run_scaling(rounds: int, progress: Progress) -> list[Any]:
    """One rank's own cost at each number of ranks of ``SCALING``."""
    task = progress.add_task("torch, one rank of w", total=len(SCALING))
    spec = {"cases": [case.as_json() for case in SCALING], "rounds": rounds}
    return list(measured("torch_scaling", spec, "one rank of w", lambda: progress.advance(task)))


def _run_own_ids(framework: str, rounds: int, turns: int, progress: Progress) -> list[tuple[str, Case, Any]]:
    cases = own_ids_cases()[framework]
    if framework == "torch":
        peers = ["FSDP2"] + ["torchrec"] * (importlib.util.find_spec("torchrec") is not None)
        found = _run_torch(cases, ["ours, auto", "ours, dense", "ours, sparse", *peers], 3, turns, progress)
    else:
        found = _run_jax(cases, ["ours, auto", "ours, routed", "GSPMD"], rounds, progress)
    return [(framework, case, each) for case, each in zip(cases, found, strict=True)]


def _run_local(framework: str, cases: list[Case], rounds: int, progress: Progress) -> list[Result]:
    """The local result of each case, each in a process of its own: what one leaves in memory is not the next one's.

    A case that fails, for want of memory say, is named and left out: the others are not lost with it.
    """
    per_case = (rounds + 1) * (1 if framework == "jax" else 2)
    task = progress.add_task(f"{framework}, local", total=len(cases) * per_case)
    module = "jax" if framework == "jax" else "torch"
    device = "cuda" if framework == "torch on a GPU" else "cpu"
    results = []
    for case in cases:
        spec = {"cases": [case.as_json()], "rounds": rounds, "device": device}
        try:
            found = measured(f"{module}_local", spec, f"{framework}, {case}", lambda: progress.advance(task))
        except RuntimeError as error:
            progress.console.print(f"left out: {error}", markup=False)
            continue
        results.append(Result(framework, case, found[0]))
    return results


_TARGETS_HEADER = ["case", "ours: what over what", "found", "at most", ""]
_SPEED_HEADER = ["case", "ours", "found", "at least", ""]


def _table(title: str, header: list[str], groups: list[list[list[str]]], console: Console) -> list[str]:
    """Show a table; returns it as lines of Markdown."""
    table = Table(*header, title=title)
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|---|---|" + "--:|" * (len(header) - 2)]
    for rows in groups:
        for row in rows:
            table.add_row(*row)
            lines.append("| " + " | ".join(row) + " |")
        table.add_section()
    console.print(table)
    return [*lines, ""]


def _write(
    folder: Path, name: str, title: str, rounds: int, facts: dict[str, str], lines: list[str], stored: Any
) -> None:
    (folder / f"{name}.json").write_text(json.dumps({**facts, "rounds": rounds, "results": stored}, indent=1) + "\n")
    head = f"# {title}\n\n{describe(facts)}\n\n{rounds} rounds, medians.\n\n"
    (folder / f"{name}.md").write_text(head + "\n".join(lines).rstrip() + "\n")


def main() -> int:
    """Parse the command line, measure, show and write."""
    if sys.argv[1:] and sys.argv[1] in _OTHERS:
        return subprocess.call([sys.executable, "-m", f"benchmarks.{sys.argv[1]}", *sys.argv[2:]], cwd=ROOT)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the base cases only, in some twenty minutes")
    parser.add_argument("--part", choices=["local", "exchange", "all_to_all"], help="one part")
    parser.add_argument("--only", choices=["torch", "jax"], help="one framework")
    parser.add_argument("--rounds", type=int, default=None, help="measurements of each (3 with --quick, else 7)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    rounds = options.rounds or (3 if options.quick else 7)
    frameworks = [options.only] if options.only else ["torch", "jax"]
    console, facts = Console(), machine_facts()
    if console.width < _WIDTH:  # cut off, numbers say nothing: a terminal may break the lines, or scroll
        console = Console(width=_WIDTH, soft_wrap=True)
    local: list[Result] = []
    exchange: list[tuple[str, Case, Any]] = []
    own_ids: list[tuple[str, Case, Any]] = []
    scaling: list[Any] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for framework in frameworks if options.part in (None, "local") else []:
            cases = local_cases(options.quick)[framework]
            local += _run_local(framework, cases, rounds, progress)
            if framework == "torch" and facts["gpu"] != NO_GPU:
                local += _run_local("torch on a GPU", cases, rounds, progress)
        for framework in frameworks if options.part in (None, "all_to_all") else []:
            own_ids += _run_own_ids(framework, rounds, 2 if options.quick else TURNS, progress)
        for framework in frameworks if options.part in (None, "exchange") else []:
            megatron = importlib.util.find_spec("megatron") is not None
            peers = [name for name in _PEERS[framework] if name != "Megatron-core" or megatron]
            candidates = ["ours, auto", "ours, routed", "ours, dense", *peers]
            cases = exchange_cases(options.quick)[framework]
            if framework == "torch":  # auto is routed there
                candidates.remove("ours, routed")
                found = _run_torch(cases, candidates, 3, 2 if options.quick else TURNS, progress)
                exchange += [(framework, case, each) for case, each in zip(cases, found, strict=True)]
                scaling = _run_scaling(rounds, progress)
                continue
            for w in sorted({case.world_size for case in cases}):
                group = [case for case in cases if case.world_size == w]
                found = _run_jax(group, candidates, rounds, progress)
                exchange += [(framework, case, each) for case, each in zip(group, found, strict=True)]
    options.output.mkdir(parents=True, exist_ok=True)
    written, title = [], describe(facts).partition(". ")[0]
    if local:
        reached = targets(local)
        lines = [*WHAT_IS_WHAT.splitlines(), "", *_table("Targets", _TARGETS_HEADER, [reached], console)]
        if why := reasons(reached):
            console.print("\n".join(why), style="dim", markup=False)
            lines += ["Where a target is missed:", "", *why, ""]
        for framework in dict.fromkeys(result.framework for result in local):
            lines += _table(framework, HEADER, [rows_of(r) for r in local if r.framework == framework], console)
        stored = [{"framework": r.framework, "case": r.case.as_json(), "found": r.found} for r in local]
        _write(options.output, "local", "One rank's lookup", rounds, facts, lines, stored)
        written += ["local.json", "local.md"]
        if draw_local(local, options.output / "local.png", title):
            written.append("local.png")
    if exchange:
        lines = [
            "Each rank's whole embedding, or its part of it, by each exchange; `auto` is what the layer chooses by itself,",
            "one of the others (in torch on a CPU: routed). MB sent: counted on the loopback, of all processes together,",
            "divided by their number; JAX's devices share one process. Times are medians, with half the distance of the",
            "quartiles. Each of torch's candidates runs in fresh processes, with nothing faulted in first.",
            "",
        ]
        if reached := exchange_targets(exchange):
            lines += _table("Targets", _SPEED_HEADER, [reached], console)
        for framework in frameworks:
            groups = [exchange_rows(case, found) for name, case, found in exchange if name == framework]
            lines += _table(framework, EXCHANGE_HEADER, groups, console)
        if scaling:
            groups = [exchange_rows(case, found) for case, found in zip(SCALING, scaling, strict=True)]
            lines += _table("torch, one rank's own cost, nothing sent", EXCHANGE_HEADER, groups, console)
        stored = [
            {"framework": name, "case": case.as_json(), "must_send_bytes": traffic(case), "found": found}
            for name, case, found in exchange
        ]
        stored += [
            {"framework": "torch, one rank", "case": case.as_json(), "found": found}
            for case, found in zip(SCALING, scaling, strict=bool(scaling))
        ]
        _write(options.output, "exchange", "The exchanges", rounds, facts, lines, stored)
        written += ["exchange.json", "exchange.md"]
        if draw_exchange(
            [(f"{name}, {case}", found) for name, case, found in exchange], options.output / "exchange.png", title
        ):
            written.append("exchange.png")
    if own_ids:
        lines = [*OWN_IDS.splitlines(), ""]
        if reached := exchange_targets(own_ids):
            lines += _table("Targets", _SPEED_HEADER, [reached], console)
        for framework in frameworks:
            groups = [exchange_rows(case, found) for name, case, found in own_ids if name == framework]
            lines += _table(framework, EXCHANGE_HEADER, groups, console)
        stored = [{"framework": name, "case": case.as_json(), "found": found} for name, case, found in own_ids]
        _write(options.output, "all_to_all", "Each rank its own ids", rounds, facts, lines, stored)
        written += ["all_to_all.json", "all_to_all.md"]
    if not any(name.endswith(".png") for name in written):
        console.print("no figures: matplotlib is not installed")
    if not written:
        console.print("nothing could be measured")
        return 1
    console.print(f"written to {options.output}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
