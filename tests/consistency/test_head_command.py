"""`pve compare --head` and `--tied`: real layers are equal, and faults are named in the head's terms."""

import os
from pathlib import Path

import numpy as np
import pytest
from marks import slower
from table_files import save

from shared.proof.case import CaseOptions
from shared.proof.head_case import ARRAYS, build_head_case
from shared.proof.head_diff import HEAD_KINDS
from shared.proof.head_expected import Expected
from shared.proof.launch import HEAD_BACKENDS

RUNNERS = Path(__file__).parents[1] / "runners"
SMALL = ["--vocab-size", "94", "--emb-size", "16", "--world-size", "4", "--padded-vocab-size", "even"]


@pytest.mark.parametrize(
    ("backends", "options"),
    [
        slower("jax", ["--tied"]),
        slower("torch,jax", ["--tied", "--dtype", "float32", "--world-size", "2"]),
        slower("torch,jax", ["--head", "--dtype", "float16", "--world-size", "2"]),
        slower("torch,jax", ["--head", "--world-size", "3", "--padded-vocab-size", "multiple-of:150"]),
        slower("torch,jax", ["--tied", "--world-size", "1", "--padded-vocab-size", "94"]),
    ],
)
def test_real_heads_are_equal(pve, backends, options):
    """Padding, a rank of nothing else, one rank alone, and ids outside the vocabulary."""
    result = pve.json("compare", *SMALL, "--backends", backends, *options)
    assert (result["equal"], result["case"]["tied"], set(result["bounds"])) == (True, "--tied" in options, set(ARRAYS))
    assert 0 < result["ids_outside"] < 20
    ranks = [*range(result["case"]["world_size"]), None]
    names = [*backends.split(","), "oracle"]
    pairs = [(left, right) for i, left in enumerate(names) for right in names[i + 1 :]]
    found = [(c["left"], c["right"], c["rank"], c["what"]) for c in result["comparisons"]]
    assert found == [(*pair, rank, what) for pair in pairs for rank in ranks for what in ARRAYS]
    held = [c for c in result["comparisons"] if c["right"] == "oracle" and c["rank"] == 0 and c["what"] != "argmax"]
    assert all(0 < c["share"] < 1 for c in held)


@pytest.fixture
def wrong(monkeypatch):
    """Let PyTorch's head be the one in NumPy with a fault."""

    def use(fault):
        monkeypatch.setenv("PYTHONPATH", str(RUNNERS), prepend=os.pathsep)
        monkeypatch.setenv("HEAD_FAULT", fault)
        monkeypatch.setitem(HEAD_BACKENDS, "torch", "wrong_head_runner")

    return use


STATISTICS = ("loss", "logprobs", "hidden gradient", "table gradient")
FAULTS = [
    ("rank missing", "--tied", dict.fromkeys(STATISTICS, "rank missing"), "without rank 1"),
    ("padding counted", "--head", dict.fromkeys(STATISTICS, "padding counted"), "2 columns"),
    ("target off by one", "--head", dict.fromkeys(STATISTICS, "target off by one"), "target +1"),
    ("times w", "--head", {"hidden gradient": "times w"}, "times 4"),
    ("not summed", "--head", {"hidden gradient": "one rank only"}, "rank 3's part"),
    ("lookup missing", "--tied", {"table gradient": "lookup missing"}, ""),
    ("disagreeing", "--head", {"loss": "ranks disagree"}, "rank 1 against rank 0"),
    slower("gathered logits", "--head", dict.fromkeys(STATISTICS, "counted w times"), "the sum times 4"),
    slower("mean over all", "--head", dict.fromkeys(("loss", *STATISTICS[2:]), "ignored in the mean"), "not 503"),
    slower("sum", "--head", dict.fromkeys(("loss", *STATISTICS[2:]), "sum for mean"), "times 503"),
    slower("local ids", "--head", {"argmax": "local id"}, "row of its rank"),
    slower("bfloat16 logits", "--head", dict.fromkeys((*STATISTICS, "argmax"), "imprecise"), ""),
]


@pytest.mark.parametrize(("fault", "option", "kinds", "note"), FAULTS)
def test_faults_are_named(pve, wrong, fault, option, kinds, note):
    wrong(fault)
    result = pve.json("compare", *SMALL, option, "--dtype", "float32", "--backends", "torch", status=1)
    # Of a rank's own part in place of the sum, the ranks' copies disagree too: what each rank shows comes last.
    different = sorted((c for c in result["comparisons"] if c["differing"]), key=lambda c: c["rank"] is not None)
    assert {c["what"]: next(iter(c["kinds"])) for c in different} == kinds
    notes = {row["note"] for c in different for row in c["examples"] if row["kind"] == kinds[c["what"]]}
    assert any(note in found for found in notes)
    assert len(notes) <= 4  # of "one rank only", one a rank


def test_rank_without_rows_explains_no_fault(pve, wrong):
    wrong("times w")
    sizes = ["--vocab-size", "7", "--world-size", "5", "--padded-vocab-size", "even", "--emb-size", "16"]
    result = pve.json("compare", *sizes, "--head", "--dtype", "float32", "--backends", "torch", status=1)
    different = [c for c in result["comparisons"] if c["differing"]]
    assert {c["what"] for c in different} == {"hidden gradient"}
    assert {kind for c in different for kind in c["kinds"]} == {"times w", "not examined"}


@pytest.mark.slow
def test_fault_is_attributed_to_its_backend(pve, wrong):
    wrong("times w")
    result = pve.json("compare", *SMALL, "--tied", status=1)
    different = [c for c in result["comparisons"] if c["differing"]]
    assert {(c["left"], c["right"], c["what"]) for c in different} >= {("torch", "jax", "hidden gradient")}
    assert {c["left"] for c in different} == {"torch"}
    assert all(next(iter(c["kinds"])) == "times w" for c in different if c["what"] == "hidden gradient")


def test_difference_in_words(pve, wrong, tmp_path):
    wrong("local ids")
    page = tmp_path / "page.html"
    printed = pve("compare", *SMALL, "--head", "--backends", "torch", "--report", page, status=1)
    for words in (
        "head of 94 x 16 bfloat16 over 4 ranks (padded to 96), tokens 4x128",
        "differ: argmax",
        "row of its rank, not of the table",
        f"local id: {HEAD_KINDS['local id']}",
        "DIFFERENT: 4 of 25 comparisons",
    ):
        assert words in printed
    assert HEAD_KINDS["local id"] in page.read_text()


@pytest.mark.parametrize("option", ["--head", "--tied"])
def test_textbook_head_is_equal(pve, wrong, tmp_path, option):
    """The runner of the faults is right without one; a table whose rows repeat has ties of the argmax."""
    wrong("none")
    table = np.random.default_rng(0).standard_normal((47, 8)).astype(np.float32)
    weights, page = save(tmp_path / "t.safetensors", {"emb": np.concatenate([table, table])}), tmp_path / "page.html"
    np.save(tmp_path / "ids.npy", np.arange(-3, 97).reshape(4, 25))
    files = ["--weights", weights, "--ids", tmp_path / "ids.npy", "--markdown", "--report", page]
    printed = pve("compare", option, *files, *SMALL[4:], "--backends", "torch")
    assert printed.startswith("**EQUAL: 25 comparisons")
    assert "of their bounds" in printed
    assert 'class="equal">EQUAL' in page.read_text()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_rows_that_are_not_finite_widen_no_bound(tmp_path, value):
    table = np.ones((8, 4), np.float32)
    found = []
    for table[5, 0] in (1, value):
        weights = save(tmp_path / "t.safetensors", {"emb": table})
        case = build_head_case(CaseOptions(weights=weights, world_size=2), False, tmp_path)
        found.append(Expected(case).bounds["logprobs"])
    assert (found[0] >= found[1]).all()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("--reduction is an option of the embedding, got all_reduce: leave it out", ["--reduction", "all_reduce"]),
        ("--exchange is an option of the embedding, got dense", ["--exchange", "dense"]),
        ("--seq-dim is an option of the embedding, got 0", ["--seq-dim", "0"]),
        ("--padding-idx is an option of the embedding, got 3", ["--padding-idx", "3"]),
        ("--dtype must be given for a head over a table of float64", ["--dtype", "float64"]),
        ("the least such size is 100", ["--vocab-size", "97", "--padded-vocab-size", "97"]),
    ],
)
@pytest.mark.parametrize("option", ["--head", "--tied"])
def test_bad_input_is_one_clear_line(pve, option, match, arguments):
    pve.refused(match, "compare", *SMALL, option, *arguments)
