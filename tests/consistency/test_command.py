"""The command `pve`, as its user meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from marks import slower
from table_files import save, save_parts

from shared.cli import compare as compare_command
from shared.proof.launch import BACKENDS

SMALL = ["--vocab-size", "96", "--emb-size", "16", "--world-size", "3"]
RUNNERS = Path(__file__).parents[1] / "runners"


@pytest.fixture
def own(tmp_path):
    """The options of a table and ids of one's own."""

    def files(table, ids):
        np.save(tmp_path / "ids.npy", ids)
        return ["--weights", save(tmp_path / "t.safetensors", {"emb": table}), "--ids", tmp_path / "ids.npy"]

    return files


def pairs(result):
    return {(c["left"], c["right"]) for c in result["comparisons"]}


ALL_PAIRS = {("torch", "jax"), ("torch", "oracle"), ("jax", "oracle")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_with_a_table_to_read(pve, dtype):
    output = pve("compare", *SMALL, "--dtype", dtype, "--padding-idx", "3", "--seed", "5")
    for words in (f"96 x 16 {dtype} over 3 ranks, ids 4x2048", "EQUAL: 24 comparisons", "torch = jax"):
        assert words in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "exchange"), [("all_reduce", "routed"), ("reduce_scatter", "dense"), ("all_to_all", "routed")]
)
def test_reductions_in_real_processes(pve, own, rng, reduction, exchange):
    """A user's own table, an odd number of columns, ids of [s, b], three torch processes and three JAX devices."""
    files = own(rng.standard_normal((42, 5)).astype(ml_dtypes.bfloat16), rng.integers(-2, 45, (6, 4)))
    options = ["--reduction", reduction, "--exchange", exchange, "--seq-dim", "0", "--padding-idx", "7"]
    result = pve.json("compare", *files, "--world-size", "3", *options)
    case = result["case"]
    assert (case["reduction"], case["exchange"], case["seq_dim"]) == (reduction, exchange, 0)
    rows = {c["rows"] for c in result["comparisons"] if c["what"] == "forward" and c["rank"] is not None}
    assert rows == {24 if reduction == "all_reduce" else 8}
    assert pairs(result) == ALL_PAIRS


@pytest.mark.slow
def test_records_of_different_exchanges_compare(pve, tmp_path):
    """The exchange is no part of what must come out: dense torch against routed JAX."""
    common = [*SMALL, "--reduction", "reduce_scatter", "--dtype", "float32", "--ids", tmp_path / "ids.npy"]
    np.save(tmp_path / "ids.npy", np.arange(96).reshape(2, 48))
    for backend, exchange in (("torch", "dense"), ("jax", "routed")):
        pve("record", "--backend", backend, "-o", tmp_path / backend, *common, "--exchange", exchange)
    output = pve("diff", tmp_path / "torch", tmp_path / "jax")
    assert "96 x 16 float32 over 3 ranks, ids 2x48, reduce_scatter" in output


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "world_size"), [((), 1), ((2, 0, 3), 4)])
def test_ids_of_any_shape(pve, own, rng, shape, world_size):
    files = own(rng.standard_normal((4, 3)).astype(np.float32), np.full(shape, 3))
    assert pve.json("compare", *files, "--world-size", world_size)["case"]["ids_shape"] == list(shape)


def test_flushed_subnormals_are_named(pve, own):
    files = own(np.full((4, 3), 1e-45, np.float32), np.arange(4))
    result = pve.json("compare", *files, "--world-size", "2", "--backends", "jax", status=1)
    different = [c for c in result["comparisons"] if c["differing"]]
    assert {(c["what"], c["rank"], *c["kinds"]) for c in different} == {("forward", None, "subnormal flushed")}
    assert pairs(result) == {("jax", "oracle")}  # one backend alone is held to the oracle


def test_compare_over_padded_ranks_from_parts(pve, tmp_path):
    """Stored in 3 parts, run over 4 ranks of which one has padding only; ids in the padding among the given ones."""
    values = np.random.default_rng(0).standard_normal((72, 4)).astype(np.float16)
    save_parts(tmp_path / "parts", np.split(values, 3))
    np.save(tmp_path / "ids.npy", np.arange(75, dtype=np.uint8).reshape(3, 5, 5))
    files = ["--weights", tmp_path / "parts", "--ids", tmp_path / "ids.npy", "--backends", "jax"]
    options = ["--vocab-size", "70", "--world-size", "4", "--padded-vocab-size", "multiple-of:96"]
    result = pve.json("compare", *files, *options)
    case = result["case"]
    assert (case["vocab_size"], case["padded_vocab_size"], case["ids_shape"]) == (70, 96, [3, 5, 5])
    assert case["source"] == "word_embeddings.weight of parts; ids of ids.npy"
    assert (result["equal"], result["ids_outside"]) == (True, 5)
    counts = {c["rank"]: c["nonzero"] for c in result["comparisons"] if c["what"] == "gradient"}
    assert counts == {0: 24, 1: 24, 2: 22, 3: 0, None: 70}


def test_missing_framework_is_skipped_and_named(pve, monkeypatch):
    monkeypatch.setattr(compare_command, "is_installed", lambda name: name == "jax")
    printed = pve("compare", *SMALL)
    assert "torch is not installed, so its layer was not run: pip install 'parallel-vocab-embedding[torch]'" in printed
    assert "EQUAL: 8 comparisons" in printed
    assert "jax = oracle" in printed
    pve.refused("--backends names torch, which is not installed", "compare", *SMALL, "--backends", "torch,jax")
    monkeypatch.setattr(compare_command, "is_installed", lambda name: False)
    pve.refused("neither torch nor jax is installed", "compare", *SMALL)


def test_layer_off_by_one_row_is_found(pve, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RUNNERS), prepend=os.pathsep)
    monkeypatch.setitem(BACKENDS, "torch", "off_by_one_runner")
    result = pve.json("compare", *SMALL, "--backends", "torch", status=1)
    assert (result["equal"], len(result["comparisons"])) == (False, 8)
    different = [c for c in result["comparisons"] if c["differing"]]
    assert {(c["what"], c["rank"]) for c in different} == {("forward", r) for r in (0, 1, 2, None)}
    for comparison in different:
        assert max(comparison["kinds"], key=comparison["kinds"].get) == "off by one row"


HOSTILE = ["shared", "json", "torch_impl", "jax_impl", "torch", "jax", "numpy", "pickle", "socket", "runpy", "struct"]


@pytest.mark.parametrize(
    ("reduction", "backends"), [("all_reduce", "torch"), slower("none", "torch,jax"), slower("all_reduce", "torch,jax")]
)
def test_nothing_in_the_current_folder_is_run(tmp_path, reduction, backends):
    """Neither by the command, nor by a backend's process, nor by those that it starts."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open('was-run', 'a').write('{name} ')")
    sizes = ["--vocab-size", "96", "--emb-size", "16", "--world-size", "2"]
    command = [str(Path(sys.executable).with_name("pve")), "compare", *sizes, "--reduction", reduction, "--json"]
    done = subprocess.run([*command, "--backends", backends], cwd=tmp_path, capture_output=True, text=True)
    assert not (tmp_path / "was-run").exists(), (tmp_path / "was-run").read_text()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["equal"]


def test_crashing_backend_is_named(pve, monkeypatch, tmp_path):
    (tmp_path / "crashing_runner.py").write_text("raise RuntimeError('out of paper')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(BACKENDS, "torch", "crashing_runner")
    pve.refused("pve: error: the torch backend failed: RuntimeError: out of paper", "compare", *SMALL)


def test_record_and_diff_are_its_halves(pve, tmp_path):
    torch, jax, oracle = (tmp_path / f"{name}.record" for name in ("torch", "jax", "oracle"))
    for path in (torch, jax, oracle):
        recorded = pve.json("record", "--backend", path.stem, "-o", path, *SMALL, "--padding-idx", "3")
        assert (recorded["backend"], recorded["vocab_size"]) == (path.stem, 96)
    page = tmp_path / "page.html"
    printed = pve("diff", torch, jax, "--markdown", "--report", page)
    assert printed.startswith("**EQUAL: 8 comparisons")
    assert re.search(r"\| sum \| 0 - 95 \| \d+ of 8192 \| \d+ of 96 \| equal \|", printed)
    assert r"- 8 of 8192 ids are outside the vocabulary \[0, 96)" in printed
    assert '<h1 class="equal">EQUAL: 8 comparisons' in page.read_text()
    assert "Rows that differ" not in page.read_text()
    assert pve.json("diff", jax, oracle)["equal"] is True
    oracle.write_bytes(b"mine")
    command = ["record", "--backend", "oracle", "-o", oracle, *SMALL, "--seed", "1"]
    pve.refused("exists: choose another name, or add --force", *command)
    assert oracle.read_bytes() == b"mine"
    assert "oracle.record: oracle, 96 x 16 bfloat16 over 3 ranks" in pve(*command, "--force")
    pve.refused("seed 0 against seed 1", "diff", torch, oracle)
    jax.write_bytes(torch.read_bytes()[:-1])
    pve.refused("not a whole safetensors file", "diff", torch, jax)
    pve.refused("--tensor is for tables", "diff", oracle, torch, "--tensor", "sum")
    pve.refused("its folder does not exist", "record", "--backend", "torch", "-o", "/no/where/record", *SMALL)


def test_plan(pve):
    sizes = ["--vocab-size", "12", "--world-size", "3", "--emb-size"]
    plan = pve.json("plan", *sizes, "5", "--dtype", "float32")
    assert plan["ranks"][1] == {"rank": 1, "start": 4, "stop": 8}
    assert (plan["rows_per_rank"], plan["bytes_per_rank"], plan["table_bytes"]) == (4, 80, 240)
    assert pve.json("plan", *sizes, "5", "--dtype", "bf16")["dtype"] == "bfloat16"
    pve.refused("--emb-size must be at least 1", "plan", *sizes, "0")


def test_plan_with_padding(pve):
    sizes = ["--vocab-size", "50257", "--world-size", "8"]
    plan = pve.json("plan", "--vocab-size", "3", "--world-size", "5", "--padded-vocab-size", "even")
    assert plan["ranks"][3:] == [{"rank": 3, "start": 3, "stop": 3}, {"rank": 4, "start": 3, "stop": 3}]
    output = pve("plan", *sizes)  # without a rule, what each would make of it
    assert "50257 rows over 8 ranks leave 1 over: pad with --padded-vocab-size." in output
    assert re.search(r"even +│ +50264 │ +6283 │ +7 ", output)
    plan = pve.json("plan", *sizes, "--emb-size", "4")
    assert (plan["padded_vocab_size"], plan["ranks"], plan["bytes_per_rank"]) == (None, [], None)
    assert plan["padding_rules"] == {"even": 50264, "multiple-of:64": 50304, "128*w": 51200}
    pve.refused("the least such size is 50264", "plan", *sizes, "--padded-vocab-size", "50257")
    pve.refused("even, multiple-of:M or M*w, got 'odd'", "plan", *sizes, "--padded-vocab-size", "odd")


SCATTERED = ["--ids", "ids.npy", "--reduction", "reduce_scatter"]


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("no such file", ["--weights", "nowhere.safetensors"]),
        ("/: no safetensors file in it", ["--weights", "/"]),
        ("pass --padded-vocab-size 99 or --padded-vocab-size even, or", ["--vocab-size", "97"]),
        ("--world-size must be at least 1", ["--world-size", "0"]),
        ("invalid choice: 'int8'", ["--dtype", "int8"]),
        ("not a readable .npy file", ["--ids", "nowhere.npy"]),
        ("need each other", ["--text", "README.md"]),
        ("--seed must not be negative", ["--seed", "-1"]),
        ("--backends takes torch and jax, separated by a comma; got 'mlx'", ["--backends", "mlx"]),
        ("--backends must name each backend once", ["--backends", "torch,torch"]),
        ("--padding-idx must be an id", ["--padding-idx", "96"]),
        ("4 positions along dimension 1, which leaves 1 over with --world-size 3", SCATTERED),
        ("--seq-dim must name a dimension of the ids", [*SCATTERED, "--seq-dim", "2"]),
        ("--seq-dim needs a reduction that splits the ids, got none", ["--seq-dim", "0"]),
        ("--exchange dense needs a reduction, got none", ["--exchange", "dense"]),
        ("invalid choice: 'sum'", ["--reduction", "sum"]),
    ],
)
def test_bad_input_is_one_clear_line(pve, tmp_path, monkeypatch, match, arguments):
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.zeros((2, 4), np.int64))
    pve.refused(match, "compare", *SMALL, *arguments)


@pytest.mark.parametrize("command", [[], ["compare"], ["record"], ["diff"], ["plan"], ["env"], ["completion"]])
def test_help_teaches(pve, command):
    output = pve(*command, "--help")
    for words in ("example", "exit status") if command else ("start here",):
        assert words in output


def test_version(pve):
    assert re.fullmatch(r"pve \d+\.\d+\.\d+\n", pve("--version"))
