"""One rank's lookup in PyTorch: ours, the forms that peers have of it, and what the memory allows, in turn."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import FIRST, Case, make_ids, peak_of, shuffled, timing, warm_pages
from benchmarks.peers.torch_lookups import LOOKUPS, Lookup
from torch_impl import ParallelVocabEmbedding

__all__ = ["main"]


class _Module(nn.Module):
    """A form as the module that it is in its library: to call one takes time too."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self.lookup = lookup

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids)


@dataclass(frozen=True)
class _Run:
    """What is timed: a call, and what is then done with its output where the gradient is measured too."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


def _expected(weight: Tensor, ids: Tensor, start: int) -> np.ndarray:
    table, local = weight.detach().cpu().float().numpy(), ids.cpu().numpy() - start
    owned = (local >= 0) & (local < len(table))
    return np.where(owned[..., None], table[np.where(owned, local, 0)], 0)


def _modules(case: Case, emb: ParallelVocabEmbedding) -> dict[str, nn.Module]:
    """By name, ours first: what looks global ids up in one and the same table."""
    start = emb.partition.start(emb.rank)
    if case.reduction != "accumulate":
        # The same layer on memory without a row of zeros behind it: what that row is worth.
        moved = ParallelVocabEmbedding(
            case.vocab_size, case.emb_size, emb.rank, case.world_size, dtype=emb.weight.dtype, device="meta"
        )
        moved.weight = nn.Parameter(emb.weight.detach())
        peers = {name: _Module(make(emb.weight, start)) for name, make in LOOKUPS.items()}
        return {"ours": emb, "ours, moved table": moved} | peers
    fused = ParallelVocabEmbedding(
        case.vocab_size,
        case.emb_size,
        emb.rank,
        case.world_size,
        dtype=emb.weight.dtype,
        device="meta",
        gradient_accumulation_fusion=True,
    )
    fused.weight = nn.Parameter(emb.weight.detach())
    return {
        "ours": fused,
        "ours, plain": emb,
        "Megatron's form": _Module(LOOKUPS["Megatron's form"](emb.weight, start)),
    }


def _measure(case: Case, rounds: int, device: str, advance: Callable[[], None]) -> dict[str, dict[str, float]]:
    dtype, w = getattr(torch, case.dtype), case.world_size
    rank = 0 if case.ids == "zipf" else w // 2  # the first ranks own most tokens of a real text
    emb = ParallelVocabEmbedding(case.vocab_size, case.emb_size, rank, w, dtype=dtype, device=device)
    ids, weight, start = torch.from_numpy(make_ids(case)).to(device), emb.weight, emb.partition.start(rank)
    modules = _modules(case, emb)
    expected = _expected(weight, ids, start)
    for name, module in modules.items():
        np.testing.assert_array_equal(module(ids).detach().cpu().float().numpy(), expected, err_msg=name)
    owned = int(np.any(expected != 0, axis=-1).sum())
    del expected
    upstream = torch.randn(*ids.shape, case.emb_size, device=device).to(dtype)
    runs = {
        name: _Run(lambda module=module: module(ids), lambda output: output.backward(upstream))  # type: ignore[misc]
        for name, module in modules.items()
    }
    # Every id names a row, of a table that is not split: what PyTorch's own layer takes.
    whole, local = nn.Embedding(*weight.shape, _weight=weight.detach()), ids % len(weight)
    runs["nn.Embedding, local ids"] = _Run(lambda: whole(local), lambda output: output.backward(upstream))
    if case.reduction == "accumulate":  # what is read and written is the tokens'
        runs["floor"] = _Run(upstream.clone, lambda _: upstream.clone())
    else:
        runs["floor"] = _Run(upstream.clone, lambda _: torch.zeros(weight.shape, dtype=dtype, device=device))
        runs["zeros"] = _Run(lambda: torch.zeros_like(upstream), runs["floor"].backward)
    parameters = [whole.weight, *(p for module in modules.values() for p in module.parameters())]
    if case.reduction != "accumulate" and "TGI's null row" in modules:
        parameters.append(modules["TGI's null row"].lookup.parameter)  # type: ignore[union-attr, arg-type]
    found: dict[str, dict[str, float]] = {name: {"owned_tokens": owned} for name in runs}
    with torch.no_grad():
        for name, run in runs.items():
            found[name]["peak_extra_bytes"] = peak_of(run.forward, device)
        for name, times in _times(runs, False, [], rounds, device, advance).items():
            found[name] |= timing("forward", times[:, 0])
    # The floor of a forward and backward has its output as zeros: to allocate it is all that must be.
    runs["floor"] = runs.get("zeros", runs["floor"])
    fresh = [] if case.reduction == "accumulate" else parameters
    for name, times in _times(runs, True, fresh, rounds, device, advance).items():
        found[name] |= timing("backward", times[:, 1]) | timing("forward_backward", times.sum(axis=1))
    if _has_steps(case):
        for kind, optimizer in (("sgd_step", torch.optim.SGD), ("adam_step", torch.optim.Adam)):
            steps = _steps(modules, emb.weight, optimizer, ids, upstream)
            for name, times in _times(steps, False, fresh, rounds, device, advance).items():
                found[name] |= timing(kind, times[:, 0])
    return found


def _has_steps(case: Case) -> bool:
    return case.reduction == "none" and case.batch * case.sequence >= 8192 and case.emb_size <= 1024


def _steps(
    modules: dict[str, nn.Module],
    weight: nn.Parameter,
    optimizer: type[torch.optim.Optimizer],
    ids: Tensor,
    upstream: Tensor,
) -> dict[str, _Run]:
    """Whole training steps: forward, backward and the optimizer's step, each form with a parameter of its own."""
    steps = {}
    for name in ("ours", "ours, moved table", "Megatron's form", "TGI's null row"):
        if name not in modules:
            continue
        module = modules[name]
        lookup = getattr(module, "lookup", None)
        parameter = getattr(lookup, "parameter", module.weight if lookup is None else weight)
        step = optimizer([parameter], lr=1e-6)

        def run(module: nn.Module = module, step: torch.optim.Optimizer = step) -> None:
            module(ids).backward(upstream)
            step.step()

        steps[name] = _Run(run, lambda _: None)
    return steps


def _times(
    runs: dict[str, _Run],
    backward: bool,
    parameters: list[Any],
    rounds: int,
    device: str,
    advance: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Seconds of each, forward and backward, round after round; short calls are repeated for two milliseconds or so.

    Args:
        runs: by name.
        backward: whether gradients are computed too.
        parameters: what has its gradient taken away before each call.
        rounds: how often all of them are timed, in an order that changes.
        device: where they run; on an accelerator the host waits for it before it looks at the clock.
        advance: called after each round.
    """
    names, times = list(runs), np.zeros((len(runs), rounds, 2))
    repeats = dict.fromkeys(names, 1)

    def now() -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def call(run: _Run) -> np.ndarray:
        for parameter in parameters:
            parameter.grad = None
        begin = now()
        output = run.forward()
        middle = now() if backward else 0.0
        if backward:
            run.backward(output)
        end = now()
        return np.array([middle - begin, end - middle] if backward else [end - begin, 0.0])

    for turn in range(-1, rounds):  # the first is not counted
        for place in shuffled(len(names), turn + 1):
            name = names[place]
            if repeats[name] == 1 and device == "cpu":
                warm_pages(2**27)
            spent = sum((call(runs[name]) for _ in range(repeats[name])), np.zeros(2))
            if turn < 0:
                repeats[name] = max(1, min(100, int(2e-3 / call(runs[name]).sum())))
            else:
                times[place, turn] = spent / repeats[name]
        advance()
    return dict(zip(names, times, strict=True))


def main() -> None:
    """Run as ``python -m benchmarks.torch_local CASES RESULT``."""
    cases, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    warm_pages(FIRST)
    # As in any process that has worked for a while: from then on the C library keeps smaller pieces of memory than this.
    np.empty(31 << 20, np.uint8).fill(1)

    def advance() -> None:
        print(json.dumps({"done": 1}), flush=True)

    device = cases.get("device", "cpu")
    found = [_measure(Case(**fields), cases["rounds"], device, advance) for fields in cases["cases"]]
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
