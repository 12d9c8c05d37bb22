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
from cli.schema import SCHEMA, faults
from marks import slower
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from table_files import save_parts

from shared.cli import compare as compare_command
from shared.cli import main
from shared.proof.launch import BACKENDS

SMALL = ["--vocab-size", "96", "--emb-size", "16", "--world-size", "3"]


def pve(*arguments):
    return subprocess.run([sys.executable, "-m", "shared.cli", *arguments], capture_output=True, text=True)


def refused(capsys, match, *arguments):
    """Exit status 2, and one line on standard error."""
    try:
        status = main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    output = capsys.readouterr()
    assert status == 2
    assert match in output.err
    assert output.out == ""
    assert len([line for line in output.err.splitlines() if "error:" in line]) == 1


@pytest.mark.slow
def test_defaults_prove_a_real_size_equal():
    done = pve("compare", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"] is True
    case = result["case"]
    assert (case["vocab_size"], case["emb_size"], case["world_size"]) == (131072, 1024, 8)
    assert (case["dtype"], case["ids_shape"]) == ("bfloat16", [4, 2048])
    pairs = {(c["left"], c["right"]) for c in result["comparisons"]}
    assert pairs == {("torch", "jax"), ("torch", "oracle"), ("jax", "oracle")}
    for pair in pairs:
        found = {(c["what"], c["rank"]) for c in result["comparisons"] if (c["left"], c["right"]) == pair}
        assert found == {(what, rank) for what in ("forward", "gradient") for rank in [*range(8), None]}
    assert all(c["differing"] == 0 and c["max_ulp"] == 0 and c["max_abs"] == 0 for c in result["comparisons"])


@pytest.mark.parametrize("dtype", ["bfloat16", *map(slower, ("float16", "float32", "float64"))])
def test_every_dtype_with_a_table_to_read(capsys, dtype):
    assert main(["compare", *SMALL, "--dtype", dtype, "--padding-idx", "3", "--seed", "5"]) == 0
    output = capsys.readouterr().out
    assert f"96 x 16 {dtype} over 3 ranks, ids 4x2048" in output
    assert "EQUAL: 24 comparisons" in output
    assert "torch = jax" in output


def test_own_table_and_ids(capsys, tmp_path, rng):
    save_file({"emb": rng.standard_normal((40, 8)).astype(ml_dtypes.bfloat16)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "ids.npy", rng.integers(0, 45, (3, 5, 2)).astype(np.uint8))
    arguments = ["--weights", str(tmp_path / "t.safetensors"), "--ids", str(tmp_path / "ids.npy"), "--world-size", "4"]
    assert main(["compare", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert faults(result, SCHEMA) == []
    assert result["case"]["ids_shape"] == [3, 5, 2]
    assert result["ids_outside"] > 0
    assert result["case"]["source"] == "emb of t.safetensors; ids of ids.npy"


@pytest.mark.parametrize(("reduction", "exchange"), [slower("all_reduce", "routed"), slower("reduce_scatter", "dense")])
def test_reductions_in_real_processes(capsys, tmp_path, rng, reduction, exchange):
    """A user's own table, an odd number of columns, ids of [s, b], three torch processes and three JAX devices."""
    save_file({"emb": rng.standard_normal((42, 5)).astype(ml_dtypes.bfloat16)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "ids.npy", rng.integers(-2, 45, (6, 4)))
    arguments = ["--weights", str(tmp_path / "t.safetensors"), "--ids", str(tmp_path / "ids.npy"), "--world-size", "3"]
    options = ["--reduction", reduction, "--exchange", exchange, "--seq-dim", "0", "--padding-idx", "7"]
    assert main(["compare", *arguments, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    case = result["case"]
    assert (case["reduction"], case["exchange"], case["seq_dim"]) == (reduction, exchange, 0)
    rows = {c["rows"] for c in result["comparisons"] if c["what"] == "forward" and c["rank"] is not None}
    assert rows == {24 if reduction == "all_reduce" else 8}
    assert {(c["left"], c["right"]) for c in result["comparisons"]} == {
        ("torch", "jax"),
        ("torch", "oracle"),
        ("jax", "oracle"),
    }


@pytest.mark.slow
def test_records_of_different_exchanges_compare(capsys, tmp_path):
    """The exchange is no part of what must come out: dense torch against routed JAX."""
    common = [*SMALL, "--reduction", "reduce_scatter", "--dtype", "float32", "--ids", str(tmp_path / "ids.npy")]
    np.save(tmp_path / "ids.npy", np.arange(96).reshape(2, 48))
    for backend, exchange in (("torch", "dense"), ("jax", "routed")):
        output = str(tmp_path / f"{backend}.record")
        assert main(["record", "--backend", backend, "-o", output, *common, "--exchange", exchange]) == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "torch.record"), str(tmp_path / "jax.record")]) == 0
    assert "96 x 16 float32 over 3 ranks, ids 2x48, reduce_scatter" in capsys.readouterr().out


def test_impossible_reductions_are_refused(capsys, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((2, 4), np.int64))
    ids = ["--ids", str(tmp_path / "ids.npy"), "--reduction", "reduce_scatter"]
    refused(capsys, "4 positions along dimension 1, which leaves 1 over with --world-size 3", "compare", *SMALL, *ids)
    refused(capsys, "--seq-dim must name a dimension of the ids", "compare", *SMALL, *ids, "--seq-dim", "2")
    refused(capsys, "--exchange dense needs a reduction, got none", "compare", *SMALL, "--exchange", "dense")
    refused(capsys, "invalid choice: 'sum'", "compare", *SMALL, "--reduction", "sum")


@pytest.mark.parametrize(
    ("shape", "world_size"), [slower((), 1), slower((), 4), slower((1,), 4), slower((0,), 1), slower((2, 0, 3), 4)]
)
def test_ids_of_any_shape(capsys, tmp_path, rng, shape, world_size):
    save_file({"emb": rng.standard_normal((4, 3)).astype(np.float32)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "ids.npy", np.full(shape, 3))
    arguments = ["--weights", str(tmp_path / "t.safetensors"), "--ids", str(tmp_path / "ids.npy")]
    assert main(["compare", *arguments, "--world-size", str(world_size), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["case"]["ids_shape"] == list(shape)


def test_flushed_subnormals_are_named(capsys, tmp_path):
    save_file({"emb": np.full((4, 3), 1e-45, np.float32)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "ids.npy", np.arange(4))
    arguments = ["--weights", str(tmp_path / "t.safetensors"), "--ids", str(tmp_path / "ids.npy")]
    assert main(["compare", *arguments, "--world-size", "2", "--backends", "jax", "--json"]) == 1
    different = [c for c in json.loads(capsys.readouterr().out)["comparisons"] if c["differing"]]
    assert {(c["what"], c["rank"], *c["kinds"]) for c in different} == {("forward", None, "subnormal flushed")}
    assert all("jax" in (c["left"], c["right"]) for c in different)


def test_one_backend_alone_is_held_to_the_oracle(capsys):
    assert main(["compare", *SMALL, "--backends", "jax", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {(c["left"], c["right"]) for c in result["comparisons"]} == {("jax", "oracle")}


def test_missing_framework_is_skipped_and_named(capsys, monkeypatch):
    monkeypatch.setattr(compare_command, "is_installed", lambda name: name == "torch")
    assert main(["compare", *SMALL]) == 0
    output = capsys.readouterr().out
    assert "jax is not installed, so its layer was not run: pip install 'parallel-vocab-embedding[jax]'" in output
    assert "torch = oracle" in output
    refused(capsys, "--backends names jax, which is not installed", "compare", *SMALL, "--backends", "torch,jax")
    monkeypatch.setattr(compare_command, "is_installed", lambda name: False)
    refused(capsys, "neither torch nor jax is installed", "compare", *SMALL)


RUNNERS = Path(__file__).parents[1] / "runners"


@pytest.mark.parametrize(("backends", "comparisons"), [("torch", 8), slower("torch,jax", 24)])
def test_layer_off_by_one_row_is_found(capsys, monkeypatch, backends, comparisons):
    monkeypatch.setenv("PYTHONPATH", str(RUNNERS), prepend=os.pathsep)
    monkeypatch.setitem(BACKENDS, "torch", "off_by_one_runner")
    command = ["compare", *SMALL, "--backends", backends]
    assert main(command) == 1
    output = capsys.readouterr().out
    assert f"DIFFERENT: {comparisons // 3 if backends != 'torch' else 4} of {comparisons} comparisons" in output
    assert "torch has row 1" in output
    if backends == "torch":
        return
    assert main([*command, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is False
    different = [c for c in result["comparisons"] if c["differing"]]
    assert {c["left"] for c in different} == {"torch"}
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


def test_crashing_backend_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "crashing_runner.py").write_text("raise RuntimeError('out of paper')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(BACKENDS, "torch", "crashing_runner")
    refused(capsys, "pve: error: the torch backend failed: RuntimeError: out of paper", "compare", *SMALL)


def test_record_and_diff_are_its_halves(capsys, tmp_path):
    paths = {name: str(tmp_path / f"{name}.record") for name in ("torch", "jax", "oracle")}
    for name, path in paths.items():
        assert main(["record", "--backend", name, "-o", path, *SMALL, "--json"]) == 0
        recorded = json.loads(capsys.readouterr().out)
        assert (recorded["backend"], recorded["vocab_size"]) == (name, 96)
    assert main(["diff", paths["torch"], paths["jax"]]) == 0
    assert "EQUAL: 8 comparisons" in capsys.readouterr().out
    assert main(["diff", paths["jax"], paths["oracle"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True

    other = str(tmp_path / "other.record")
    assert main(["record", "--backend", "oracle", "-o", other, *SMALL, "--seed", "1"]) == 0
    assert "other.record: oracle, 96 x 16 bfloat16 over 3 ranks" in capsys.readouterr().out
    refused(capsys, "records of different cases: seed 0 against seed 1", "diff", paths["torch"], other)

    with safe_open(other, "np") as file:
        metadata = file.metadata()
    whole = (tmp_path / "torch.record").read_bytes()
    (tmp_path / "cut.record").write_bytes(whole[:-1])
    refused(capsys, "not a whole safetensors file", "diff", paths["jax"], str(tmp_path / "cut.record"))
    save_file(load_file(other), other, {**metadata, "format": "something else"})
    refused(capsys, "not a record of `pve record`", "diff", paths["jax"], other)
    refused(capsys, "--tensor is for tables", "diff", paths["jax"], paths["torch"], "--tensor", "sum")


def test_plan(capsys):
    assert main(["plan", "--vocab-size", "131072", "--world-size", "8", "--emb-size", "1024"]) == 0
    output = capsys.readouterr().out
    assert "131072 rows over 8 ranks, 16384 each" in output
    assert "114688" in output
    assert "33.6 MB" in output
    assert (
        main(["plan", "--vocab-size", "12", "--world-size", "3", "--emb-size", "5", "--dtype", "float32", "--json"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"][1] == {"rank": 1, "start": 4, "stop": 8}
    assert (plan["rows_per_rank"], plan["bytes_per_rank"], plan["table_bytes"]) == (4, 80, 240)
    refused(
        capsys, "--emb-size must be at least 1", "plan", "--vocab-size", "8", "--world-size", "8", "--emb-size", "0"
    )


def test_plan_with_padding(capsys):
    sizes = ["--vocab-size", "50257", "--world-size", "8"]
    assert main(["plan", *sizes, "--padded-vocab-size", "128*w", "--emb-size", "768"]) == 0
    output = capsys.readouterr().out
    assert "50257 rows, padded to 51200, over 8 ranks, 6400 each" in output
    for cells in (
        ("7", "44800", "50256", "5457", "943"),
        ("even", "50264", "6283", "7"),
        ("128*w", "51200", "6400", "943"),
    ):
        assert any(
            [cell.strip() for cell in line.split("│")[1:]][: len(cells)] == [*cells] for line in output.splitlines()
        )
    assert main(["plan", "--vocab-size", "3", "--world-size", "5", "--padded-vocab-size", "even", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["padded_vocab_size"] == 5
    assert plan["ranks"][3:] == [{"rank": 3, "start": 3, "stop": 3}, {"rank": 4, "start": 3, "stop": 3}]
    assert plan["padding_rules"] == {"even": 5, "multiple-of:64": 320, "128*w": 640}
    assert main(["plan", *sizes]) == 0  # without a rule, what each would make of it
    output = capsys.readouterr().out
    assert "50257 rows over 8 ranks leave 1 over: pad with --padded-vocab-size." in output
    assert re.search(r"even +│ +50264 │ +6283 │ +7 ", output)
    assert main(["plan", *sizes, "--emb-size", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["padded_vocab_size"], plan["ranks"], plan["bytes_per_rank"]) == (None, [], None)
    assert plan["padding_rules"] == {"even": 50264, "multiple-of:64": 50304, "128*w": 51200}
    refused(capsys, "the least such size is 50264", "plan", *sizes, "--padded-vocab-size", "50257")
    refused(capsys, "even, multiple-of:M or M*w, got 'odd'", "plan", *sizes, "--padded-vocab-size", "odd")


def test_compare_over_padded_ranks_from_parts(capsys, tmp_path):
    """Stored in 3 parts, run over 4 ranks of which one has padding only; ids in the padding among the made-up ones."""
    values = np.random.default_rng(0).standard_normal((72, 4)).astype(np.float16)
    save_parts(tmp_path / "parts", np.split(values, 3))
    options = ["--vocab-size", "70", "--world-size", "4", "--padded-vocab-size", "multiple-of:96", "--backends", "jax"]
    assert main(["compare", "--weights", str(tmp_path / "parts"), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["case"]["vocab_size"], result["case"]["padded_vocab_size"], result["equal"]) == (70, 96, True)
    counts = {c["rank"]: c["nonzero"] for c in result["comparisons"] if c["what"] == "gradient"}
    assert counts[None] == 70
    assert (counts[2], counts[3]) == (22, 0)


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
    ],
)
def test_bad_input_is_one_clear_line(capsys, match, arguments):
    refused(capsys, match, "compare", *SMALL, *arguments)


def test_unwritable_record_is_refused_before_any_work(capsys):
    refused(capsys, "its folder does not exist", "record", "--backend", "torch", "-o", "/no/where/record", *SMALL)


@pytest.mark.parametrize("command", [[], ["compare"], ["record"], ["diff"], ["plan"], ["env"], ["completion"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    output = capsys.readouterr()
    assert (ended.value.code, output.err) == (0, "")
    for words in ("example", "exit status") if command else ("start here",):
        assert words in output.out


def test_record_is_replaced_with_force_only(capsys, tmp_path):
    path = tmp_path / "oracle.record"
    path.write_bytes(b"mine")
    command = ["record", "--backend", "oracle", "-o", str(path), *SMALL]
    refused(capsys, "exists: choose another name, or add --force", *command)
    assert path.read_bytes() == b"mine"
    assert main([*command, "--force"]) == 0
    assert path.read_bytes() != b"mine"


def test_seq_dim_needs_reduce_scatter(capsys):
    refused(capsys, "--seq-dim needs a reduction that splits the ids, got none", "compare", "--seq-dim", "0")


def test_short_names_of_dtypes(capsys):
    sizes = ["--vocab-size", "8", "--world-size", "2", "--emb-size", "4", "--json"]
    shown = []
    for name in ("bf16", "bfloat16"):
        assert main(["plan", *sizes, "--dtype", name]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0]["dtype"] == "bfloat16"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"pve \d+\.\d+\.\d+\n", capsys.readouterr().out)
