"""`pve diff` of tables: what it takes, what it refuses, and in which words."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, rng):
    """A checkpoint, Megatron-style parts of it, two tables in one file, and a record."""
    monkeypatch.chdir(tmp_path)
    table = rng.standard_normal((10, 4)).astype(np.float32)
    save_file({"wte.weight": table}, "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "model.safetensors"}})
    )
    padded = np.concatenate([table, np.zeros((2, 4), np.float32)]).astype(np.float16)
    for rank, part in enumerate(np.split(padded, 2)):
        (tmp_path / f"parts/mp_rank_{rank:02d}").mkdir(parents=True)
        save_file({"word_embeddings.weight": part}, f"parts/mp_rank_{rank:02d}/model.safetensors")
    save_file({"a": table, "b": -table, "narrow": table[:, :2].copy()}, "two.safetensors")
    record = ["record", "--backend", "oracle", "-o", "oracle.record"]
    assert main([*record, "--vocab-size", "8", "--emb-size", "4", "--world-size", "2"]) == 0


MODEL = "model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([MODEL, "parts"], 0),
        (["model.safetensors.index.json", "parts", "--vocab-size", "9"], 0),
        ([MODEL, "two.safetensors", "--tensor", "wte.weight", "--tensor", "a"], 0),
        (["two.safetensors", "two.safetensors", "--tensor", "a", "--tensor", "b"], 1),
        (["oracle.record", "oracle.record"], 0),
    ],
)
def test_the_exit_status_tells(arguments, status, capsys):
    assert main(["diff", *arguments]) == status
    assert ("EQUAL", "DIFFERENT")[status] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([MODEL, "oracle.record"], "oracle.record is a record, but model.safetensors is not a record"),
        (["parts", "oracle.record"], "give two of one kind"),
        ([MODEL, "two.safetensors"], "two.safetensors: pass --tensor; none looks like an input embedding"),
        ([MODEL, "two.safetensors", "--tensor", "a"], "no tensor 'a' in it"),
        ([MODEL, MODEL, *["--tensor", "a"] * 3], "--tensor must be given once, or twice for A and B, got 3 names"),
        ([MODEL, "parts", "--vocab-size", "11"], "--vocab-size must be at most the 10 rows that model.safetensors has"),
        ([MODEL, "parts", "--vocab-size", "0"], "--vocab-size must be at least 1, got 0"),
        ([MODEL, "parts", "--world-size", "0"], "--world-size must be at least 1, got 0"),
        ([MODEL, "two.safetensors", "--tensor", "wte.weight", "--tensor", "narrow"], "two.safetensors has 2 columns"),
        (["oracle.record", "oracle.record", "--world-size", "2"], "--world-size is for tables"),
        ([MODEL, "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_errors_are_one_line_in_the_commands_words(arguments, match, capsys):
    capsys.readouterr()
    assert main(["diff", *arguments]) == 2
    printed = capsys.readouterr()
    assert match in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
