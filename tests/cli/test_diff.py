"""`pve diff` of tables: what it takes, what it refuses, and in which words."""

import numpy as np
import pytest
from table_files import save, save_index, save_parts

from shared.cli import main

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, Megatron-style parts of it, two tables in one file, and a record."""
    folder = tmp_path_factory.mktemp("diff")
    table = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    save_index(folder / "model.safetensors.index.json", {MODEL: {"wte.weight": table}})
    padded = np.concatenate([table, np.zeros((2, 4), np.float32)]).astype(np.float16)
    save_parts(folder / "parts", np.split(padded, 2))
    save(folder / "two.safetensors", {"a": table, "b": -table})
    sizes = ["--vocab-size", "8", "--emb-size", "4", "--world-size", "2"]
    assert main(["record", "--backend", "oracle", "-o", str(folder / "oracle.record"), *sizes]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


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
def test_the_exit_status_tells(pve, arguments, status):
    assert ("EQUAL", "DIFFERENT")[status] in pve("diff", *arguments, status=status)
    assert pve.json("diff", *arguments, status=status)["equal"] == (status == 0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([MODEL, "oracle.record"], "oracle.record is a record, but model.safetensors is not a record"),
        ([MODEL, "two.safetensors"], "two.safetensors: pass --tensor; none looks like an input embedding"),
        ([MODEL, MODEL, *["--tensor", "a"] * 3], "--tensor must be given once, or twice for A and B, got 3 names"),
        ([MODEL, "parts", "--vocab-size", "11"], "--vocab-size must be at most the 10 rows that model.safetensors has"),
        ([MODEL, "parts", "--world-size", "0"], "--world-size must be at least 1, got 0"),
        (["oracle.record", "oracle.record", "--world-size", "2"], "--world-size is for tables"),
        ([MODEL, "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_errors_are_one_line_in_the_commands_words(pve, arguments, match):
    pve.refused(match, "diff", *arguments)
