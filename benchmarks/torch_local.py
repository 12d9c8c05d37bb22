"""One rank's lookup in PyTorch: ours, the forms that peers have of it, and what the memory allows, in turn."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, make_ids, peak_of, shuffled, warm_pages
from torch_impl import ParallelVocabEmbedding

__all__ = ["CANDIDATES", "main"]

Lookup = Callable[[Tensor], Tensor]


def _megatron(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        foreign = (ids < start) | (ids >= start + n)
        local = ids.clone() - start
        local[foreign] = 0
        output = F.embedding(local, weight)
        output[foreign, :] = 0.0
        return output

    return lookup


def _megatron_deterministic(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        foreign = (ids < start) | (ids >= start + n)
        local = ids.clone() - start
        local[foreign] = 0
        output = weight[local]
        output[foreign, :] = 0.0
        return output

    return lookup


def _vllm(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        owned = (ids >= start) & (ids < start + n)
        output = F.embedding(owned * (ids - start), weight)
        return output.masked_fill_(~owned.unsqueeze(-1), 0)

    return lookup


def _null_row(weight: Tensor, start: int) -> Lookup:
    n = len(weight)
    longer = nn.Parameter(torch.cat([weight.detach(), weight.new_zeros(1, weight.shape[1])]))

    def lookup(ids: Tensor) -> Tensor:
        return F.embedding(torch.where((ids < start) | (ids >= start + n), n, ids - start), longer)

    lookup.parameter = longer  # type: ignore[attr-defined]
    return lookup


def _times_mask(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        owned = (ids >= start) & (ids < start + n)
        return F.embedding((ids - start) * owned, weight) * owned.unsqueeze(-1)

    return lookup


def _bags(weight: Tensor, start: int) -> Lookup:
    """Adding one row to nothing: it turns -0.0 into 0.0."""
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        owned = (flat >= start) & (flat < start + n)
        rows = flat[owned] - start
        output = F.embedding_bag(rows, weight, owned.cumsum(0) - owned.long(), mode="sum")
        return output.view(*ids.shape, weight.shape[1])

    return lookup


def _own_rows(weight: Tensor, start: int) -> Lookup:
    """No lookup of a part: every id names a row. What F.embedding itself takes."""
    n = len(weight)
    return lambda ids: F.embedding(ids % n, weight)


CANDIDATES: dict[str, Callable[[Tensor, int], Lookup]] = {
    "Megatron's form": _megatron,
    "Megatron's, deterministic": _megatron_deterministic,
    "vLLM's form": _vllm,
    "TGI's null row": _null_row,
    "torchtitan's, times the mask": _times_mask,
    "embedding_bag": _bags,
    "F.embedding of as many rows": _own_rows,
}
"""The forms of a lookup that peers have, in our own words; of a rank's table and its first row."""


class _Module(nn.Module):
    """A form as the module that it is in its library: to call one takes time too."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self.lookup = lookup

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids)


def _expected(weight: Tensor, ids: Tensor, start: int) -> np.ndarray:
    table, local = weight.detach().float().numpy(), ids.numpy() - start
    owned = (local >= 0) & (local < len(table))
    return np.where(owned[..., None], table[np.where(owned, local, 0)], 0)


def _measure(case: Case, rounds: int, advance: Callable[[], None]) -> dict[str, dict[str, float]]:
    dtype, w = getattr(torch, case.dtype), case.world_size
    rank = 0 if case.ids == "zipf" else w // 2  # the first ranks own most tokens of a real text
    emb = ParallelVocabEmbedding(case.vocab_size, case.emb_size, rank, w, dtype=dtype)
    ids, weight, start = torch.from_numpy(make_ids(case)), emb.weight, emb.partition.start(rank)
    lookups: dict[str, Lookup] = {"ours": emb}
    lookups |= {name: _Module(make(weight, start)) for name, make in CANDIDATES.items()}
    expected = _expected(weight, ids, start)
    for name, lookup in lookups.items():
        if lookup is not lookups["F.embedding of as many rows"]:
            np.testing.assert_array_equal(lookup(ids).detach().float().numpy(), expected, err_msg=name)
    del expected
    upstream = torch.randn(*ids.shape, case.emb_size).to(dtype)
    forward: dict[str, Callable[[], Any]] = {
        name: lambda lookup=lookup: lookup(ids)  # type: ignore[misc]
        for name, lookup in lookups.items()
    }
    both: dict[str, Callable[[], Any]] = {
        name: lambda lookup=lookup: lookup(ids).backward(upstream)  # type: ignore[misc]
        for name, lookup in lookups.items()
    }
    forward["floor"] = upstream.clone
    both["floor"] = lambda: (torch.zeros(upstream.shape, dtype=dtype), torch.zeros(weight.shape, dtype=dtype))
    parameters = [weight, lookups["TGI's null row"].lookup.parameter]  # type: ignore[attr-defined]
    found: dict[str, dict[str, float]] = {name: {} for name in forward}
    with torch.no_grad():
        for name, run in forward.items():
            found[name]["peak_extra_bytes"] = peak_of(run)
            found[name]["forward"] = 0.0
    for kind, runs in (("forward", forward), ("forward_backward", both)):
        with torch.set_grad_enabled(kind != "forward"):
            times = _times(runs, parameters, rounds, advance)
        for name, each in times.items():
            found[name][kind] = float(np.median(each))
    return found


def _times(
    runs: dict[str, Callable[[], Any]], parameters: list[Any], rounds: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds a call of each, round after round; short calls are repeated for two milliseconds or so."""
    names, times = list(runs), {name: [] for name in runs}  # type: ignore[var-annotated]
    repeats = dict.fromkeys(names, 1)
    for turn in range(rounds + 1):
        for place in shuffled(len(names), turn):
            name = names[place]
            if repeats[name] == 1:
                warm_pages()
            spent = 0.0
            for _ in range(repeats[name]):
                for parameter in parameters:
                    parameter.grad = None
                begin = time.perf_counter()
                output = runs[name]()
                spent += time.perf_counter() - begin
                del output
            if turn == 0:  # not counted
                again = time.perf_counter()
                runs[name]()
                repeats[name] = max(1, min(100, int(2e-3 / (time.perf_counter() - again))))
            else:
                times[name].append(spent / repeats[name])
        advance()
    return times


def main() -> None:
    """Run as ``python -m benchmarks.torch_local CASES RESULT``."""
    cases, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    # As in any process that has worked for a while: from then on the C library keeps smaller pieces of memory than this.
    np.empty(31 << 20, np.uint8).fill(1)

    def advance() -> None:
        print(json.dumps({"done": 1}), flush=True)

    found = [_measure(Case(**fields), cases["rounds"], advance) for fields in cases["cases"]]
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
