"""The measurements run, on something small; what they count is right. How long things take is nobody's test."""

import importlib.util

import numpy as np
import pytest
from rich.progress import Progress

from benchmarks.__main__ import _rows, _run
from benchmarks.cases import Case, make_ids, traffic


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_every_candidate_is_measured(framework):
    case = Case("reduce_scatter", 2, "zipf", 2, 8, vocab_size=64, emb_size=16)
    peers = ["DTensor"] if framework == "torch" else ["psum", "GSPMD"]
    if framework == "torch" and importlib.util.find_spec("megatron") is not None:
        peers.append("Megatron-core")
    candidates = ["ours, auto", "ours, routed", "ours, dense", *peers]
    with Progress(disable=True) as progress:
        (found,) = _run(framework, [case], candidates, 2, progress)
    assert list(found) == candidates
    assert all(0 < times["forward"] < times["forward_backward"] * 10 for times in found.values())
    assert [row[1] for row in _rows(case, found)] == candidates
    if framework == "torch":
        assert all(times["sent_bytes"] > 0 for times in found.values())


def test_what_must_be_sent():
    case = Case("reduce_scatter", 4, "zipf")
    ids = make_ids(case)
    assert ids.shape == (4, 2048)
    sent = traffic(case)
    assert sent["dense"] == 3 / 4 * 8192 * 4096
    distinct = sum(len(np.unique(chunk)) for chunk in np.split(ids, 4, axis=1))
    # A quarter of the rows that a chunk needs are its own rank's; the rest are sent once each.
    np.testing.assert_allclose(sent["routed"] / sent["dense"], distinct / (4 * 8192), rtol=0.05)
    everywhere = traffic(Case("all_reduce", 4, "uniform"))
    assert everywhere["routed"] <= everywhere["dense"] / 2
