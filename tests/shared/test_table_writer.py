"""One file or Megatron-style parts: every bit comes back, and the old file or the new one is whole at any moment."""

import errno
import functools
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from table_files import CODES, any_bits, assert_same, bits, contents, save

from shared import VocabPartition
from shared.bits import STORED_DTYPES, cast
from shared.tables import table_writer
from shared.tables.find_table import open_table
from shared.tables.table_file import TableSpec
from shared.tables.table_writer import convert_table, write_table

PARTITION = VocabPartition(30, 4, 40)
"""The last rank has no row but padding."""
FORMS = {"file.safetensors": None, "parts": PARTITION}


def rows_at(path, tensor=None):
    return open_table(path, tensor, 30).rows(0, 30)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(table_writer, "_PIECE_BYTES", 64)


@pytest.fixture
def table(tmp_path, rng):
    (tmp_path / "source").mkdir()
    return open_table(save(tmp_path / "source" / "t.safetensors", {"wte.weight": any_bits(rng, 30, 6, np.float32)}))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_every_bit_comes_back_in_every_form(tmp_path, rng, small_pieces, dtype):
    values = any_bits(rng, 30, 6, STORED_DTYPES[dtype])
    table = open_table(save(tmp_path / "source.safetensors", {"wte.weight": values}))
    for world_size, padded in ((1, None), (4, 40), (64, "even")):
        parts, counted = tmp_path / f"parts{world_size}", []
        partition = VocabPartition(30, world_size, padded)
        files = convert_table(table, parts, partition, progress=counted.append)
        assert [file.relative_to(parts).parts[0] for file in files] == [f"mp_rank_{r:02d}" for r in range(world_size)]
        assert sum(counted) == 30
        table = open_table(parts, vocab_size=30)
        assert table.partition == partition
        found = np.concatenate([open_table(file).rows(0, partition.rows_per_rank) for file in files])
        assert_same(found[:30], values)
        assert not bits(found[30:]).any()  # padding rows are zero
    (merged,) = convert_table(table, tmp_path / "merged.safetensors")
    assert merged.read_bytes()[-values.nbytes :] == values.tobytes()
    with safe_open(merged, "np") as file:
        whole = file.get_slice("wte.weight")
        assert (whole.get_dtype(), whole.get_shape()) == (CODES[dtype], [30, 6])
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("form", FORMS)
def test_target_created_by_another_process_meanwhile_stays(tmp_path, table, form):
    target = tmp_path / form
    theirs = target / "other" if form == "parts" else target

    def progress(rows):
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")

    with pytest.raises((ValueError, OSError), match=r"exists|not empty"):
        convert_table(table, target, FORMS[form] and VocabPartition(30, 1), progress=progress)
    assert theirs.read_text() == "theirs"
    assert not list(tmp_path.glob(".*"))


def test_folder_filled_meanwhile_stays(tmp_path, table):
    folder = tmp_path / "parts"

    def fill(_rows):
        folder.mkdir(exist_ok=True)
        (folder / "mine").touch()

    with pytest.raises(ValueError, match="parts: exists; parts are written to a new folder"):
        convert_table(table, folder, VocabPartition(table.vocab_size, 1), progress=fill)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "parts"}
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("t.bin", {}, r"end its name in .safetensors"),
        ("folder.safetensors", {}, "not a regular file"),
        ("parts", {"partition": VocabPartition(32, 4)}, "partition must be of the table's 30 rows"),
        ("t.safetensors", {"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, table, name, options, match):
    (tmp_path / "folder.safetensors").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=match):
        convert_table(table, tmp_path / name, force=True, **options)
    assert contents(tmp_path) == before


def test_links_are_kept_and_hard_links_are_optional(tmp_path, table, monkeypatch):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "there" / "real.safetensors")

    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    convert_table(table, link)
    assert link.is_symlink()
    assert_same(rows_at(tmp_path / "there" / "real.safetensors"), table.rows(0, 30))


# Failures leave everything as it was. The tests of hostile files damage the source


class Forgetful(io.FileIO):
    """Writes zeros in place of the rows, or of the header."""

    def __init__(self, rows, *arguments):
        super().__init__(*arguments)
        self.rows = rows

    def write(self, data):
        return super().write(bytes(len(data)) if self.rows == (self.tell() > 0) else data)


@pytest.mark.parametrize(("form", "replaced"), [("file.safetensors", True), ("parts", False)])
@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (True, r"rows \d+ to \d+ of the table are not there as written"),
        (False, "not a whole safetensors file"),
    ],
)
def test_what_does_not_read_back_is_not_kept(tmp_path, table, monkeypatch, small_pieces, form, replaced, rows, match):
    if replaced:
        convert_table(table, tmp_path / form, dtype="float16")
    there = contents(tmp_path)
    monkeypatch.setattr(table_writer, "open", functools.partial(Forgetful, rows), raising=False)
    with pytest.raises(ValueError, match=match):
        convert_table(table, tmp_path / form, FORMS[form], force=True)
    assert contents(tmp_path) == there


# Stopped before each call of the operating system in turn, in a forked process; says what is there afterwards.
STOPPED = '''
import errno, itertools, json, os, signal, shutil, sys
from pathlib import Path
from shared import VocabPartition
from shared.tables import table_writer
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

folder = Path(sys.argv[1])
os.fsync = lambda descriptor: None
tables = {name: open_table(folder / f"{name}.safetensors") for name in "AB"}
NAMED = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.link", "fsync"}
table_writer._PIECE_BYTES = 200

def write(name):
    convert_table(tables[name], target, VocabPartition(30, 3, 36) if form == "parts" else None, force=True)

def found():
    if not target.exists():
        return "nothing"
    there = open_table(target, vocab_size=30).rows(0, 30).tobytes()
    return next((name for name, table in tables.items() if table.rows(0, 30).tobytes() == there), "other rows")

def stop_before(number, report):
    calls = itertools.count(1)
    def step(name, arguments=()):
        if name in NAMED and next(calls) == number:
            os.write(report, name.encode())
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if how == "interrupted" else OSError(errno.ENOSPC, "No space left on device")
    os.fsync = lambda descriptor: step("fsync")
    sys.addaudithook(step)

def outcome(number):
    """What is there after a child process was stopped before its call of that number."""
    shutil.rmtree(target.parent)
    target.parent.mkdir()
    if before == "A":
        write("A")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            stop_before(number, writing)
            write("B")
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writing)
    with open(reading) as pipe:
        call = pipe.read()
    hidden = len(list(target.parent.glob(".*")))
    return {"before": call, "status": status, "found": found(), "hidden": hidden}

for form, before in [("file.safetensors", "A"), ("file.safetensors", "nothing"), ("parts", "nothing")]:
    target = folder / before / form / form
    target.parent.mkdir(parents=True)
    write("B")  # what is imported late is there from now on
    for how in ("killed", "interrupted", "full"):
        outcomes = []
        while not outcomes or outcomes[-1]["before"]:
            outcomes.append(outcome(len(outcomes) + 1))
        print(json.dumps([form, before, how, outcomes]))
'''


def test_old_or_new_file_is_whole_at_any_stop(tmp_path, rng):
    for name in "AB":
        save(tmp_path / f"{name}.safetensors", {"wte.weight": any_bits(rng, 30, 6, np.float16)})
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 9
    for form, before, how, outcomes in lines:
        note = (form, before, how)
        synced = [each["before"] for each in outcomes].count("fsync")
        assert synced == (8 if form == "parts" else 2), note  # each file, and each folder that has a new entry
        assert {each["found"] for each in outcomes} == {before, "B"}, note
        assert outcomes[0]["found"] == before, note
        assert outcomes[-1] == {"before": "", "status": 0, "found": "B", "hidden": 0}, note
        if how != "killed":
            # Only a failure to remove the temporary file itself may leave it.
            left = {each["before"] for each in outcomes if each["hidden"]}
            assert left <= {"os.remove", "os.listdir", "open"}, note


# Several processes, one file


def exchanges(processes):
    """What each process is to exchange values by. Threads stand for processes; values travel as JSON."""
    barrier, given = threading.Barrier(processes, timeout=10), [None] * processes

    def exchange(process, mine):
        given[process] = json.dumps(mine)
        barrier.wait()
        everyones = [json.loads(text) for text in given]
        barrier.wait()
        return everyones

    return [functools.partial(exchange, process) for process in range(processes)]


RANGES = [[(0, 8), (16, 24)], [(8, 16)], [], [(24, 30), (30, 30)]]
SPEC = TableSpec("lm_head.weight", "bfloat16", 30, 6)


@pytest.fixture
def values(rng):
    return any_bits(rng, 30, 6, ml_dtypes.bfloat16)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "table.safetensors"


def together(path, values, change=lambda process: {}, **options):
    """Four processes write a table; returns what each of them raised, or None."""

    def run(process, exchange):
        mine = {"path": path, "spec": SPEC, "ranges": RANGES[process], "rows": lambda start, stop: values[start:stop]}
        write_table(**{**mine, **options, **change(process)}, process=process, exchange=exchange)

    with ThreadPoolExecutor(len(RANGES)) as pool:
        futures = [pool.submit(run, process, exchange) for process, exchange in enumerate(exchanges(len(RANGES)))]
    return [future.exception() for future in futures]


def test_processes_write_a_file_together(target, values, small_pieces):
    assert together(target, np.zeros_like(values)) == [None] * 4
    refused = together(target, values)
    assert all("exists; pass --force (force=True)" in str(error) for error in refused)
    assert not bits(rows_at(target, SPEC.tensor)).any()
    assert together(target, values, force=True) == [None] * 4
    assert_same(rows_at(target, SPEC.tensor), values)
    assert [*target.parent.iterdir()] == [target]


def failing(*_):
    raise InterruptedError("enough")


@pytest.mark.parametrize(
    ("process", "module", "name"), [(0, None, ""), (3, None, ""), (0, table_writer, "header_bytes"), (0, os, "replace")]
)
def test_one_process_failing_fails_all_and_changes_nothing(target, values, monkeypatch, process, module, name):
    """As it gives its rows, creates the file or renames it."""
    together(target, np.zeros_like(values))
    before = contents(target.parent)
    if module is not None:
        monkeypatch.setattr(module, name, failing)
    changed = {"rows": failing} if module is None else {}
    outcomes = together(target, values, lambda p: changed if p == process else {}, force=True)
    assert isinstance(outcomes.pop(process), InterruptedError)
    assert [str(error) for error in outcomes] == [f"process {process} could not write its part: enough"] * 3
    assert contents(target.parent) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"path": "elsewhere.safetensors"}, "the processes disagree about path"),
        ({"spec": TableSpec("lm_head.weight", "float16", 30, 6)}, "the processes disagree about table"),
        ({"force": True}, "the processes disagree about force"),
        ({"ranges": []}, r"rows \[8, 16\) belong to no process"),
        ({"ranges": [(4, 16)]}, r"rows \[4, 8\) belong to more than one process"),
    ],
)
def test_processes_that_disagree_are_all_refused(target, values, change, match):
    outcomes = together(target, values, lambda process: change if process == 1 else {})
    for error in outcomes:
        with pytest.raises(ValueError, match=match):
            raise error
    assert not list(target.parent.iterdir())


# Bounded memory


def test_memory_does_not_grow_with_the_table(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(table_writer, "_PIECE_BYTES", 1 << 16)
    rows = 1 << 14
    table = open_table(save(tmp_path / "t", {"wte.weight": rng.standard_normal((rows, 64))}))  # 8 MiB
    tracemalloc.start()
    convert_table(table, tmp_path / "parts", VocabPartition(rows, 7, "even"))
    parts = open_table(tmp_path / "parts", vocab_size=rows)
    (merged,) = convert_table(parts, tmp_path / "half.safetensors", dtype="float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert_same(open_table(merged).rows(0, rows), cast(table.rows(0, rows), STORED_DTYPES["float16"]))
