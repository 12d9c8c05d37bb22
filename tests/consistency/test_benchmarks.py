"""The measurements run, on something small; what they count is right. How long things take is nobody's test."""

import functools
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from rich.progress import Progress

from benchmarks.__main__ import _run_jax, _run_local, _run_own_ids, _run_scaling, _run_torch
from benchmarks.cases import Case, make_ids, timing, traffic
from benchmarks.exchange import SCALING
from benchmarks.exchange import rows_of as exchange_rows
from benchmarks.exchange import targets as exchange_targets
from benchmarks.head import _jax_case, _torch_case
from benchmarks.local import Result, reasons, rows_of, targets
from benchmarks.plots import draw_exchange, draw_local

SMALL = {"vocab_size": 64, "emb_size": 16}


@pytest.fixture
def progress():
    with Progress(disable=True) as disabled:
        yield disabled


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_every_candidate_is_measured(framework, progress, monkeypatch):
    """The processes compare rows and gradients with what they must be, and fail otherwise."""
    case = Case("reduce_scatter", 2, "zipf", 2, 8, **SMALL)
    peers = ["DTensor"] if framework == "torch" else ["psum", "GSPMD"]
    if framework == "torch" and importlib.util.find_spec("megatron") is not None:
        peers.append("Megatron-core")
    candidates = ["ours, auto", "ours, routed", "ours, dense", *peers]
    run = functools.partial(_run_torch, turns=1) if framework == "torch" else _run_jax
    (found,) = run([case], candidates, rounds=2, progress=progress)
    assert [row[1] for row in exchange_rows(case, found)] == list(found) == candidates

    case = replace(case, reduction="all_to_all")
    monkeypatch.setattr("benchmarks.__main__.own_ids_cases", lambda: {framework: [case]})
    ((_, _, own_ids),) = _run_own_ids(framework, 2, 1, progress)
    assert {"torch": "FSDP2", "jax": "GSPMD"}[framework] in own_ids

    (local,) = _run_local(framework, [replace(case, reduction="none")], 2, progress)
    assert {"ours", "floor", {"torch": "Megatron's form", "jax": "jnp.take, GSPMD"}[framework]} <= set(local.found)
    for times in (each for measured in (found, own_ids, local.found) for each in measured.values()):
        assert times["forward"] > 0
        assert times["forward_backward"] > 0
    assert framework == "jax" or all(times["sent_bytes"] > 0 for times in (*found.values(), *own_ids.values()))


@pytest.mark.slow
def test_accumulation_scaling_and_heads_are_measured(progress):
    (result,) = _run_local("torch", [Case("accumulate", 1, "zipf", 1, 8, **SMALL)], 2, progress)
    assert {"ours", "ours, plain", "Megatron's form", "floor"} <= set(result.found)
    assert [row[1] for row in targets([result])] == ["a micro-batch / the plain way"]
    found = _run_scaling(1, progress)
    assert [list(each) for each in found] == [["ours, routed", "ours, dense"]] * len(SCALING)
    assert [case.world_size for case in SCALING] == [8, 64, 512]
    spec = {"tokens": 32, "vocab_size": 64, "emb_size": 8, "rounds": 1, "world_size": 4, "dtype": "float32"}
    for found in (_torch_case(spec, 1), _jax_case(spec)):
        losses = [run["loss"] for run in found.values()]
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5, err_msg="all candidates compute one loss")
        assert len(losses) >= 2
        assert all(run["forward_backward"] > 0 for run in found.values())


def result_of(case, ours, floor, megatron):
    both = {"peak_extra_bytes": 2e6, "forward_spread": 0.1}
    found = {
        name: {"forward": t, "forward_backward": 2 * t, **both}
        for name, t in (("ours", ours), ("floor", floor), ("Megatron's form", megatron))
    }
    return Result("torch", case, found)


def test_a_target_is_met_or_missed_by_what_was_measured():
    large = result_of(Case("none", 8, "uniform"), 1.04, 1.0, 1.5)
    assert [row[1:] for row in targets([large])] == [
        ["forward / Megatron's form", "0.69", "0.75", "met"],
        ["forward + backward / Megatron's form", "0.69", "0.60", "missed"],
    ]
    (reason,) = reasons(targets([large]))
    assert reason.startswith("- Megatron's form: ")
    gpu = {name: {**times, "owned_tokens": 1024} for name, times in large.found.items()}
    # 8192 rows written and 1024 read in the time in which a copy writes and reads 8192 each.
    assert [row[2:] for row in targets([Result("torch on a GPU", large.case, gpu)])] == [["1.85", "1.18", "missed"]]
    assert rows_of(large)[0][2:5] == ["1040.00 ms ±10%", "1.04", "1.00"]
    case = Case("reduce_scatter", 4, "zipf")
    found = {name: {"forward": t, "forward_backward": 2 * t} for name, t in (("ours, auto", 1.0), ("DTensor", 3.0))}
    assert [row[1:] for row in exchange_targets([("torch", case, found), ("jax", case, found)])] == [
        ["forward: times as fast as DTensor", "3.00", "2.50", "met"],
        ["forward + backward: times as fast as DTensor", "3.00", "5.00", "missed"],
    ]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_figure_is_drawn(tmp_path):
    few = [result_of(Case("none", 8, "uniform", 1, tokens), 1e-5, 1e-6, 1e-5) for tokens in (1, 8)]
    assert draw_local([result_of(Case("none", 8, "uniform"), 1.0, 0.9, 2.0), *few], tmp_path / "a.png", "a machine")
    assert timing("forward", [1.0, 2.0, 3.0]) == {"forward": 2.0, "forward_spread": 0.25}
    found = {name: timing("forward", [1.0]) | timing("forward_backward", [2.0]) for name in ("ours, auto", "DTensor")}
    assert draw_exchange([("torch: a case", found)], tmp_path / "b.png", "a machine")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_must_be_sent():
    case = Case("reduce_scatter", 4, "zipf")
    sent, ids = traffic(case), make_ids(case)
    assert sent["dense"] == 3 / 4 * 8192 * 4096
    # A quarter of the rows that a chunk needs are its own rank's; the rest are sent once each.
    distinct = sum(len(np.unique(chunk)) for chunk in np.split(ids, 4, axis=1))
    np.testing.assert_allclose(sent["routed"] / sent["dense"], distinct / (4 * 8192), rtol=0.05)
