"""`pve convert`, as its user meets it."""

import contextlib
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from table_files import contents, save

from shared.bits import cast
from shared.tables.find_table import open_table


@pytest.fixture
def values(rng):
    return rng.standard_normal((30, 6)).astype(np.float32)


@pytest.fixture
def place(tmp_path, values, monkeypatch, pve):
    """The working folder: a checkpoint, and Megatron-style parts of the same table."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model.safetensors", {"wte.weight": values, "wpe.weight": np.ones((8, 6), np.float32)})
    pve("convert", "model.safetensors", "parts", "--world-size", "4", "--padded-vocab-size", "8*w")
    return tmp_path


def test_there_and_back(pve, place, values):
    assert [len(load_file(path)["wte.weight"]) for path in sorted((place / "parts").glob("*/*"))] == [8] * 4
    pve("convert", "parts", "more", "--vocab-size", "30", "--world-size", "7", "--padded-vocab-size", "even")
    pve("convert", "more", "merged.safetensors", "--vocab-size", "30")
    assert load_file("merged.safetensors")["wte.weight"].tobytes() == values.tobytes()
    # Parts do not know their vocabulary, so the size given is believed.
    pve("convert", "parts", "merged.safetensors", "--vocab-size", "25", "--force")
    np.testing.assert_array_equal(load_file("merged.safetensors")["wte.weight"], values[:25])


def test_json(pve, place, values):
    options = ["--world-size", "4", "--padded-vocab-size", "multiple-of:64", "--dtype", "float16"]
    found = pve.json("convert", "model.safetensors", "new", *options)
    files = [f"new/mp_rank_{rank:02d}/model.safetensors" for rank in range(4)]
    assert found == {
        "schema_version": 1,
        "command": "convert",
        "output": "new",
        "files": files,
        "tensor": "wte.weight",
        "dtype": "float16",
        "vocab_size": 30,
        "emb_size": 6,
        "world_size": 4,
        "padded_vocab_size": 64,
        "bytes": sum(map(os.path.getsize, files)),
    }
    rows = open_table("new", vocab_size=30).rows(0, 30)
    np.testing.assert_array_equal(rows, cast(values, np.dtype(np.float16)))
    one = pve.json("convert", "new", "one.safetensors", "--vocab-size", "30", "--dtype", "float64")
    assert (one["files"], one["world_size"], one["dtype"]) == (["one.safetensors"], None, "float64")


def test_tensor_can_be_named_and_names_are_printed_as_they_are(pve, place):
    name = "[bold]" + "a long name " * 15 + ":smile:.safetensors"
    output = pve("convert", "model.safetensors", name, "--tensor", "wpe.weight")
    assert output.startswith(f"{name}: wpe.weight, 8 x 6 float32")
    assert len(output.splitlines()) == 1
    np.testing.assert_array_equal(load_file(name)["wpe.weight"], np.ones((8, 6), np.float32))


def test_examples_of_the_help_work(pve, monkeypatch, tmp_path, rng):
    """In order, in a folder that has what they name; GPT-2's table is the one that needs padding."""
    monkeypatch.chdir(tmp_path)
    table = rng.standard_normal((50257, 2)).astype(np.float16)
    (tmp_path / "checkpoint-folder").mkdir()
    for name, rows in (("model", 50256), ("checkpoint-folder/model", 50256), ("gpt2", 50257)):
        save(tmp_path / f"{name}.safetensors", {"wte.weight": table[:rows]})
    text = pve("convert", "--help")
    lines = [line.strip() for line in text.split("examples:")[1].splitlines() if line.startswith("  pve ")]
    assert len(lines) >= 4
    assert "exit status:" in text
    for line in lines:
        arguments = shlex.split(line.split("    (")[0])[1:]  # the rest is said about it
        pve(*arguments, *["--force"] * (tmp_path / arguments[2]).is_file())


def test_progress_goes_to_the_terminal_and_not_into_the_output(place):
    """Without a terminal it goes nowhere, as the other tests show."""
    reader, terminal = os.openpty()
    command = [sys.executable, "-m", "shared.cli", "convert", "model.safetensors", "new.safetensors", "--json"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end, as Linux tells it of a terminal
        while True:
            shown += os.read(reader, 1 << 16)
    os.close(reader)
    assert json.loads(done.stdout)["files"] == ["new.safetensors"]
    assert b"30 of 30 rows" in shown


NEW = ["model.safetensors", "new"]


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("nowhere: no such file or folder", ["nowhere", "new.safetensors"]),
        ("model.safetensors: exists; pass --force", ["parts", "model.safetensors", "--vocab-size", "30"]),
        ("parts: exists; parts are written to a new", ["model.safetensors", "parts", "--world-size", "3", "--force"]),
        ("parts: a table is written to one safetensors file", ["model.safetensors", "parts", "--force"]),
        ("the next size that divides is 32", [*NEW, "--world-size", "4"]),
        ("the least such size is 32", [*NEW, "--world-size", "4", "--padded-vocab-size", "30"]),
        ("--world-size must be at least 1, got 0", [*NEW, "--world-size", "0"]),
        ("--padded-vocab-size must be", [*NEW, "--world-size", "3", "--padded-vocab-size", "odd"]),
        ("--padded-vocab-size pads parts", [*NEW, "--padded-vocab-size", "even"]),
        ("invalid choice: 'int8'", [*NEW, "--dtype", "int8"]),
        ("no tensor 'lm_head' in it; there are: ", [*NEW, "--tensor", "lm_head"]),
        ("--vocab-size must be given for parts that may be padded", ["parts", "new.safetensors"]),
        ("the following arguments are required: OUTPUT", ["model.safetensors"]),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(pve, place, match, arguments):
    before = contents(place)
    pve.refused(match, "convert", *arguments)
    assert contents(place) == before


TOO_LARGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200,) * 2)
from shared.cli import main
sys.exit(main(sys.argv[1:]))
"""

# At the first temporary file. A shell ignores the signal in what it starts in the background.
INTERRUPTED = """
import os, signal, sys
from shared.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
seen = []
def interrupt(event, arguments):
    if event in ("open", "os.mkdir") and str(arguments[0]).endswith(".tmp") and not seen:
        seen.append(event)
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(interrupt)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("program", "says"), [(TOO_LARGE, "File too large"), (INTERRUPTED, "interrupted")])
@pytest.mark.parametrize("arguments", [["model.safetensors", "--force"], ["new", "--world-size", "5"]])
def test_refusal_by_the_operating_system_and_ctrl_c_change_nothing(place, program, says, arguments):
    """Real ones: files may not become as large as these, and a signal."""
    before = contents(place)
    command = [sys.executable, "-c", program, "convert", "model.safetensors", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pve: error: ")
    assert says in done.stderr
    assert contents(place) == before
