"""`pve shard`, `pve reshard` and `pve merge`, as their user meets them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.bits import cast
from shared.cli import main
from shared.tables.find_table import open_table
from shared.tables.tensor_file import header_bytes

COMMANDS = ["shard", "reshard", "merge"]


@pytest.fixture
def values(rng):
    return rng.standard_normal((30, 6)).astype(np.float32)


@pytest.fixture
def place(tmp_path, values, monkeypatch):
    """The folder that the commands run in: a checkpoint, a set of shards and Megatron-style parts of the same table."""
    monkeypatch.chdir(tmp_path)
    save_file({"wte.weight": values, "wpe.weight": np.ones((8, 6), np.float32)}, "model.safetensors")
    assert main(["shard", "model.safetensors", "-o", "set", "--world-size", "3"]) == 0
    megatron = ["--layout", "megatron", "--padded-vocab-size", "8*w"]
    assert main(["shard", "model.safetensors", "-o", "parts", "--world-size", "4", *megatron]) == 0
    return tmp_path


def contents(folder):
    """Everything below a folder, byte for byte."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def told(capsys, *arguments):
    """What a command that succeeds prints, which is nothing on standard error."""
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def refused(capsys, match, *arguments):
    """Exit status 2, and one line on standard error that says what was wrong (after argparse's usage, if it is that)."""
    try:
        status = main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code
    output = capsys.readouterr()
    assert status == 2
    assert match in output.err
    assert output.out == ""
    assert len([line for line in output.err.splitlines() if "error:" in line]) == 1
    if "usage:" not in output.err:
        assert len(output.err.splitlines()) == 1
        assert output.err.startswith("pve: error: ")


def assert_rows(path, expected, **options):
    table = open_table(path, **options)
    rows = table.rows(0, table.vocab_size)
    assert rows.dtype == expected.dtype
    np.testing.assert_array_equal(rows, expected)


def test_there_and_back(capsys, place, values):
    capsys.readouterr()
    sharded = told(
        capsys, "shard", "model.safetensors", "-o", "new", "--world-size", "4", "--padded-vocab-size", "even"
    )
    assert sharded.startswith("new: wte.weight, 30 x 6 float32 over 4 ranks, padded to 32: 4 files, ")
    assert len(sharded.splitlines()) == 1
    assert open_table("new").partition.padded_vocab_size == 32
    resharded = told(capsys, "reshard", "new", "-o", "newer", "--world-size", "5")
    assert resharded.startswith("newer: wte.weight, 30 x 6 float32 over 5 ranks: 5 files, ")
    in_place = told(capsys, "reshard", "newer", "-o", "newer", "--world-size", "1", "--force")
    assert in_place.startswith("newer: wte.weight, 30 x 6 float32 over 1 ranks: 1 file, ")
    merged = told(capsys, "merge", "newer", "-o", "merged.safetensors")
    assert merged.startswith("merged.safetensors: wte.weight, 30 x 6 float32: 1 file, ")
    assert load_file("merged.safetensors")["wte.weight"].tobytes() == values.tobytes()


def test_megatron_parts_there_and_back(capsys, place, values):
    capsys.readouterr()
    parts = sorted((place / "parts").glob("*/*"))
    assert [len(load_file(path)["wte.weight"]) for path in parts] == [8] * 4
    resharded = told(capsys, "reshard", "parts", "-o", "new", "--world-size", "3", "--vocab-size", "30")
    assert resharded.startswith("new: wte.weight, 30 x 6 float32 over 3 ranks: 3 files")
    told(capsys, "merge", "parts", "-o", "merged", "--vocab-size", "30")
    assert_rows("merged", values)
    # A wrong size is the user's word against nobody's: these parts do not know better.
    told(capsys, "merge", "parts", "-o", "merged", "--vocab-size", "25", "--force")
    assert_rows("merged", values[:25])


def test_json_tells_what_was_written(capsys, place, values):
    capsys.readouterr()
    options = ["--world-size", "4", "--padded-vocab-size", "multiple-of:64", "--dtype", "float16", "--json"]
    shard = json.loads(told(capsys, "shard", "model.safetensors", "-o", "new", *options))
    assert [shard.pop(key) for key in ("output", "tensor", "dtype")] == ["new", "wte.weight", "float16"]
    assert [shard.pop(key) for key in ("vocab_size", "emb_size", "world_size", "padded_vocab_size")] == [30, 6, 4, 64]
    files = shard.pop("files")
    assert (
        sorted(files) == files == sorted(str(path) for path in (place / "new").relative_to(place).glob("*.safetensors"))
    )
    assert shard.pop("bytes") == sum(os.path.getsize(file) for file in files)
    assert shard == {}
    assert_rows("new", cast(values, np.dtype(np.float16)))

    reshard = json.loads(told(capsys, "reshard", "new", "-o", "newer", "--world-size", "2", "--json"))
    assert (reshard["world_size"], reshard["padded_vocab_size"], len(reshard["files"])) == (2, 30, 2)
    parts = ["--world-size", "2", "--layout", "megatron", "--json"]
    megatron = json.loads(told(capsys, "reshard", "new", "-o", "new parts", *parts))
    assert megatron["files"] == [f"new parts/mp_rank_{rank:02d}/model.safetensors" for rank in (0, 1)]
    merge = json.loads(told(capsys, "merge", "new", "-o", "merged", "--dtype", "float64", "--json"))
    assert (merge["files"], merge["world_size"], merge["dtype"]) == (["merged"], 1, "float64")
    assert merge["bytes"] == os.path.getsize("merged")


def test_the_tensor_can_be_named(capsys, place):
    told_of = told(capsys, "shard", "model.safetensors", "-o", "new", "--world-size", "2", "--tensor", "wpe.weight")
    assert "new: wpe.weight, 8 x 6 float32" in told_of
    assert_rows("new", np.ones((8, 6), np.float32))


def test_names_are_printed_as_they_are(capsys, place):
    capsys.readouterr()
    name = "[bold]" + "a long name " * 15 + ":smile:"
    output = told(capsys, "merge", "set", "-o", name)
    assert output.startswith(f"{name}: wte.weight")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    output = capsys.readouterr()
    assert output.err == ""
    examples = output.out.split("examples:")[1].split("exit status:")
    assert len(examples) == 2, "no exit status after the examples"
    assert examples[0].count(f"  pve {command} ") >= 2
    for option in ("--output", "--tensor", "--dtype", "--force", "--json", "--vocab-size"):
        assert option in output.out
    assert ("--world-size" in output.out.split("options:")[1]) == (command != "merge")


def test_the_examples_of_the_help_work(capsys, monkeypatch, tmp_path, rng):
    """In order, as they stand, in a folder that has what they name; GPT-2's table is the one that needs padding."""
    monkeypatch.chdir(tmp_path)
    table = rng.standard_normal((50257, 2)).astype(np.float16)
    for name, rows in (("model", 50256), ("checkpoint-folder/model", 50256), ("gpt2", 50257)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"wte.weight": table[:rows]}, f"{name}.safetensors")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  pve ")]
        for line in lines:
            arguments = shlex.split(line.split("    (")[0])[1:]  # the rest is said about it
            if (tmp_path / arguments[arguments.index("-o") + 1]).exists() and "--force" not in arguments:
                arguments.append("--force")
            assert main(arguments) == 0, line
            assert capsys.readouterr().err == "", line


PROGRESS = ["merge", "set", "-o", "merged", "--json"]


def test_progress_goes_to_the_terminal_and_not_into_the_output(place):
    reader, terminal = os.openpty()
    command = [sys.executable, "-m", "shared.cli", *PROGRESS]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 1 << 16)
        except OSError:  # the end, as Linux tells it of a terminal
            break
    os.close(reader)
    assert json.loads(done.stdout)["files"] == ["merged"]
    assert b"30 of 30 rows" in shown


def test_without_a_terminal_progress_is_silent(place):
    done = subprocess.run([sys.executable, "-m", "shared.cli", *PROGRESS], capture_output=True, check=True)
    assert json.loads(done.stdout)["files"] == ["merged"]
    assert done.stderr == b""


WORLD = ["--world-size", "3"]


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("nowhere: no such file or folder", ["shard", "nowhere", "-o", "new", *WORLD]),
        ("nowhere: no such file or folder", ["reshard", "nowhere", "-o", "new", *WORLD]),
        ("nowhere: no such file or folder", ["merge", "nowhere", "-o", "new"]),
        ("set: exists; pass --force", ["shard", "model.safetensors", "-o", "set", *WORLD]),
        ("set: exists; pass --force", ["reshard", "set", "-o", "set", *WORLD]),
        ("parts: exists; pass --force", ["reshard", "set", "-o", "parts", *WORLD, "--layout", "megatron"]),
        ("model.safetensors: exists; pass --force", ["merge", "set", "-o", "model.safetensors"]),
        ("set: exists and is not a regular file", ["merge", "set", "-o", "set", "--force"]),
        (
            "model.safetensors: exists and is not a folder",
            ["shard", "set", "-o", "model.safetensors", *WORLD, "--force"],
        ),
        (".: holds other files", ["shard", "model.safetensors", "-o", ".", *WORLD, "--force"]),
        ("no/where: its folder does not exist", ["merge", "set", "-o", "no/where"]),
        ("the next size that divides is 32", ["shard", "model.safetensors", "-o", "new", "--world-size", "4"]),
        (
            "the least such size is 32",
            ["reshard", "set", "-o", "new", "--world-size", "4", "--padded-vocab-size", "30"],
        ),
        ("world_size must be at least 1, got 0", ["shard", "model.safetensors", "-o", "new", "--world-size", "0"]),
        (
            "--padded-vocab-size must be a number of rows",
            ["shard", "set", "-o", "new", *WORLD, "--padded-vocab-size", "odd"],
        ),
        ("multiple_of must be at least 1", ["shard", "set", "-o", "new", *WORLD, "--padded-vocab-size", "0*w"]),
        ("invalid choice: 'int8'", ["shard", "model.safetensors", "-o", "new", *WORLD, "--dtype", "int8"]),
        ("invalid choice: 'file'", ["shard", "model.safetensors", "-o", "new", *WORLD, "--layout", "file"]),
        ("no tensor 'lm_head' in it; there are: ", ["merge", "model.safetensors", "-o", "new", "--tensor", "lm_head"]),
        ("no tensor 'lm_head' in it; there is: wte.weight", ["merge", "set", "-o", "new", "--tensor", "lm_head"]),
        ("vocab_size must be given for parts that may be padded", ["merge", "parts", "-o", "new"]),
        ("at most the 32 rows that the parts have, got 33", ["merge", "parts", "-o", "new", "--vocab-size", "33"]),
        ("vocab_size must be that of the table: asked for 29", ["merge", "set", "-o", "new", "--vocab-size", "29"]),
        ("the following arguments are required: -o/--output", ["merge", "set"]),
        ("the following arguments are required: --world-size", ["reshard", "set", "-o", "new"]),
        ("unrecognized arguments: --world-size", ["merge", "set", "-o", "new", *WORLD]),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(capsys, place, match, arguments):
    before = contents(place)
    capsys.readouterr()
    refused(capsys, match, *arguments)
    assert contents(place) == before


def test_a_damaged_set_is_refused_and_nothing_is_written(capsys, place):
    shard = sorted((place / "set").glob("rank-*"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = contents(place)
    capsys.readouterr()
    for arguments in (["merge", "set", "-o", "new"], ["reshard", "set", "-o", "set", "--world-size", "2", "--force"]):
        refused(capsys, "damaged, the checksum of rows 10 to 19 of the table does not match", *arguments)
        assert contents(place) == before


INTERRUPTED = """
import os, signal, sys
from shared.tables import table_writer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins without
copy, interrupted = table_writer._copy, []
def interrupted_once(*arguments):
    if not interrupted:
        interrupted.append(True)
        os.kill(os.getpid(), signal.SIGINT)
    return copy(*arguments)
table_writer._copy = interrupted_once
from shared.cli import main
sys.exit(main(sys.argv[1:]))
"""

TOO_LARGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from shared.cli import main
sys.exit(main(sys.argv[2:]))
"""

WRITING = {
    "shard": ["shard", "model.safetensors", "-o", "new", "--world-size", "2"],
    "reshard in place": ["reshard", "set", "-o", "set", "--world-size", "5", "--force"],
    "megatron": ["reshard", "set", "-o", "parts", "--world-size", "5", "--layout", "megatron", "--force"],
    "merge": ["merge", "set", "-o", "merged"],
    "merge over a file": ["merge", "set", "-o", "model.safetensors", "--force"],
}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("writing", ["reshard in place", "megatron", "merge over a file", slow("shard"), slow("merge")])
def test_an_interrupt_among_the_rows_changes_nothing(place, writing):
    before = contents(place)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *WRITING[writing]], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "pve: error: interrupted\n")
    assert contents(place) == before


@pytest.mark.parametrize("writing", ["reshard in place", slow("megatron"), slow("merge over a file")])
def test_a_refusal_by_the_operating_system_changes_nothing(place, writing):
    """A real one: files may not become as large as these."""
    before = contents(place)
    command = [sys.executable, "-c", TOO_LARGE, "200", *WRITING[writing]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pve: error: ")
    assert "File too large" in done.stderr
    assert contents(place) == before


@pytest.mark.parametrize("writing", ["reshard in place", slow("shard"), slow("merge")])
def test_ctrl_c_during_a_long_conversion_leaves_nothing_behind(place, writing):
    """Half a gigabyte, interrupted as soon as there is a file on its way."""
    rows, columns = 1 << 17, 1024
    header = header_bytes("wte.weight", "float32", (rows, columns), {})
    with open("long.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * columns * 4)  # zeros that take no room on the disk
    arguments = WRITING[writing].copy()
    arguments[1] = "long.safetensors"
    if writing == "reshard in place":
        arguments[arguments.index("--world-size") + 1] = "4"
    names = set(place.rglob("*"))
    before = {path: path.read_bytes() for path in names if path.is_file() and path.name != "long.safetensors"}
    command = [sys.executable, "-m", "shared.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        while not any(path.is_file() and path not in names for path in place.rglob("*")):
            assert running.poll() is None
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, output, errors) == (2, b"", b"pve: error: interrupted\n")
    assert set(place.rglob("*")) == names
    assert {path: path.read_bytes() for path in before} == before
