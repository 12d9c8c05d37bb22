"""Tables as one file, as shards, as Megatron-style parts: every bit comes back, and the target is whole at any moment."""

import ctypes
import errno
import fcntl
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from shared import VocabPartition
from shared.bits import DTYPES, STORED_DTYPES, cast
from shared.cli import main
from shared.padding_rules import padded_by_rule
from shared.tables import row_checks, table_writer
from shared.tables.find_table import open_table
from shared.tables.layouts import LAYOUTS, ShardsLayout
from shared.tables.manifest import Manifest
from shared.tables.row_checks import read_facts
from shared.tables.table_writer import convert_table, write_together
from shared.tables.tensor_file import STORAGE_CODES, header_bytes, read_header

WORLD_SIZES = [1, 2, 3, 7, 8, 64]
PADDINGS = [None, "even", "multiple-of:64", "128*w"]


def bits(values):
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def made_up(rng, rows, columns, dtype):
    """Any bits at all: NaNs of every kind, infinities, subnormals and -0.0 among them."""
    return rng.integers(0, 256, (rows, columns * np.dtype(dtype).itemsize), np.uint8).view(dtype)


def table_of(path, values, tensor="wte.weight"):
    """A table in a file of someone else's, which says nothing of ranks or checksums."""
    dtype = next(name for name, stored in STORED_DTYPES.items() if stored == values.dtype)
    path.write_bytes(header_bytes(tensor, dtype, values.shape, {}) + values.tobytes())
    return open_table(path)


def rows_at(path, **options):
    table = open_table(path, **options)
    return table.rows(0, table.vocab_size)


def contents(folder):
    """Everything below a folder, byte for byte."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def partition_by(rule, vocab_size, world_size):
    """None where the rule does not fit, as no padding does not where the ranks do not divide the vocabulary."""
    if rule is None and vocab_size % world_size:
        return None
    return VocabPartition(vocab_size, world_size, padded_by_rule(rule, vocab_size, world_size))


def assert_holds(path, expected):
    """A file has just these rows, as safetensors itself reads it."""
    with safe_open(path, "np") as file:
        (tensor,) = file.keys()
        found = file.get_slice(tensor)
        assert tuple(found.get_shape()) == expected.shape
        code = next(STORAGE_CODES[name] for name, stored in STORED_DTYPES.items() if stored == expected.dtype)
        assert found.get_dtype() == code
    if code.startswith("F8"):  # which safetensors does not hand to NumPy
        place = read_header(path).tensors[tensor]
        data = np.fromfile(path, np.uint8, offset=place.offset)
    else:
        data = bits(load_file(path)[tensor])
    np.testing.assert_array_equal(data, bits(expected))


def assert_is_set(folder, values, partition):
    """A folder holds a manifest and one file a rank, with the rows it owns and none of padding; each tells its place."""
    manifest = Manifest.load(folder / "manifest.json")
    assert manifest.partition == partition
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(shard.file for shard in manifest.shards)}
    for rank, shard in enumerate(manifest.shards):
        start, stop = partition.owned_range(rank)
        assert_holds(folder / shard.file, values[start:stop])
        facts = read_facts(read_header(folder / shard.file), shard.file)
        assert (facts.cuts[0], facts.cuts[-1]) == (start, stop)
        assert VocabPartition(facts.vocab_size, facts.world_size, facts.padded_vocab_size) == partition
        assert (facts.set_id, facts.checksum) == (manifest.set_id, shard.crc32)
    assert sum(shard.stop - shard.start for shard in manifest.shards) == len(values)
    np.testing.assert_array_equal(bits(rows_at(folder)), bits(values))


def assert_comes_back(folder, table, values, partitions):
    """A table, converted to shards over and over, over other ranks each time, and at last to a file again."""
    for number, partition in enumerate(partitions):
        counted = []
        files = convert_table(table, folder / f"set{number}", "shards", partition, progress=counted.append)
        assert len(files) == partition.world_size
        assert sum(counted) == len(values)
        assert_is_set(folder / f"set{number}", values, partition)
        table = open_table(folder / f"set{number}")
        assert (table.partition, table.tensor) == (partition, "wte.weight")
    assert convert_table(table, folder / "merged", "file", VocabPartition(len(values), 1)) == [folder / "merged"]
    assert_holds(folder / "merged", values)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many checksums and many tasks for a table of a few rows."""
    monkeypatch.setattr(row_checks, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(table_writer, "_PIECES_PER_TASK", 3)


@pytest.fixture
def table(tmp_path, rng):
    """30 rows of 6 numbers; the file lies in a folder of its own, so that all of tmp_path is the targets'."""
    (tmp_path / "source").mkdir()
    return table_of(tmp_path / "source" / "table.safetensors", made_up(rng, 30, 6, np.float32))


# Every bit comes back


@pytest.mark.parametrize("seed", range(8))
def test_any_table_comes_back_over_any_ranks_and_paddings(tmp_path, small_blocks, seed):
    rng = np.random.default_rng(seed)
    rows, columns = (int(number) for number in rng.integers(1, (80, 12)))
    values = made_up(rng, rows, columns, [*STORED_DTYPES.values()][seed % len(STORED_DTYPES)])
    source = table_of(tmp_path / "source", values)
    choices = [partition_by(rule, rows, w) for w in WORLD_SIZES for rule in PADDINGS]
    choices = [partition for partition in choices if partition is not None]
    assert_comes_back(tmp_path, source, values, [choices[i] for i in rng.permutation(len(choices))[:4]])


def all_partitions(rows):
    """Neighbours differ in ranks as in padding."""
    pairs = [(w, rule) for rule in PADDINGS for w in WORLD_SIZES]
    return [p for p in (partition_by(rule, rows, w) for w, rule in pairs) if p is not None]


@pytest.mark.parametrize("every", [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def test_a_trained_table_comes_back(tmp_path, every):
    (package,) = importlib.util.find_spec("wordllama").submodule_search_locations
    source = open_table(Path(package) / "weights" / "l2_supercat_256.safetensors")
    assert (source.vocab_size, source.emb_size, source.dtype) == (32000, 256, "float16")
    values = source.rows(0, 32000)
    for number, partition in enumerate(all_partitions(32000)[::every]):
        convert_table(source, tmp_path / f"set{number}", "shards", partition, tensor="wte.weight")
        assert_is_set(tmp_path / f"set{number}", values, partition)
        source = open_table(tmp_path / f"set{number}")
    convert_table(source, tmp_path / "merged", "file", VocabPartition(32000, 1))
    assert_holds(tmp_path / "merged", values)


@pytest.mark.slow
def test_a_table_of_gpt2s_sizes_comes_back(tmp_path, rng):
    values = made_up(rng, 50257, 768, ml_dtypes.bfloat16)
    source = table_of(tmp_path / "source", values)
    rules = [None, "even", "multiple-of:64", "even", "128*w", "multiple-of:64"]
    partitions = [partition_by(rule, 50257, w) for w, rule in zip(WORLD_SIZES, rules, strict=True)]
    assert [partition.padding_rows for partition in partitions] == [0, 1, 47, 3, 943, 47]
    assert_comes_back(tmp_path, source, values, partitions)


@pytest.mark.parametrize("rows", [1, 5])
def test_more_ranks_than_rows(tmp_path, rng, rows):
    values = made_up(rng, rows, 3, np.float16)
    source = table_of(tmp_path / "source", values)
    assert_comes_back(tmp_path, source, values, [VocabPartition(rows, w, "even") for w in (8, 64, 7)])
    convert_table(source, tmp_path / "parts", "megatron", VocabPartition(rows, 8, "even"))
    np.testing.assert_array_equal(bits(rows_at(tmp_path / "parts", vocab_size=rows)), bits(values))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_every_dtype_in_every_layout(tmp_path, rng, small_blocks, dtype):
    values = made_up(rng, 30, 6, STORED_DTYPES[dtype])
    source = table_of(tmp_path / "source", values)
    for layout, world_size in itertools.product(LAYOUTS, (1, 3, 7)):
        target = tmp_path / f"{layout}{world_size}"
        convert_table(source, target, layout, VocabPartition(30, world_size, "even"))
        again = open_table(target, vocab_size=30)
        assert (again.dtype, again.tensor, again.emb_size) == (dtype, "wte.weight", 6)
        np.testing.assert_array_equal(bits(again.rows(0, 30)), bits(values))


@pytest.mark.parametrize("stored", STORED_DTYPES)
def test_a_cast_rounds_once(tmp_path, rng, small_blocks, stored):
    values = made_up(rng, 30, 6, STORED_DTYPES[stored])
    source = table_of(tmp_path / "source", values)
    for dtype, layout in zip(STORED_DTYPES, itertools.cycle(LAYOUTS), strict=False):
        target = tmp_path / dtype
        convert_table(source, target, layout, VocabPartition(30, 4, "even"), dtype=dtype)
        again = open_table(target, vocab_size=30)
        assert again.dtype == dtype
        np.testing.assert_array_equal(bits(again.rows(0, 30)), bits(cast(values, STORED_DTYPES[dtype])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tensor_can_be_renamed(tmp_path, table, layout):
    for tensor in ("model.embed_tokens.weight", 'тензор "1"\\\n'):
        convert_table(table, tmp_path / "target", layout, VocabPartition(30, 3), tensor=tensor, force=True)
        again = open_table(tmp_path / "target", tensor, vocab_size=30)
        np.testing.assert_array_equal(bits(again.rows(0, 30)), bits(table.rows(0, 30)))


def test_one_file_tells_the_whole_table_whoever_wrote_it(tmp_path, table):
    convert_table(table, tmp_path / "merged", "file", VocabPartition(30, 4, "even"))
    facts = read_facts(read_header(tmp_path / "merged"), "merged")
    assert (facts.vocab_size, facts.emb_size, facts.world_size, facts.padded_vocab_size) == (30, 6, 1, 30)
    assert facts.cuts == (0, 8, 16, 24, 30)
    with safe_open(tmp_path / "merged", "np") as file:
        assert file.metadata()["format"] == "pt"  # what transformers asks for
    assert_holds(tmp_path / "merged", table.rows(0, 30))


def test_a_shard_opened_by_itself_finds_its_set(tmp_path, table):
    files = convert_table(table, tmp_path / "set", "shards", VocabPartition(30, 4, 40))
    for path in [*files, tmp_path / "set" / "manifest.json"]:
        found = open_table(path)
        assert found.partition == VocabPartition(30, 4, 40)
        np.testing.assert_array_equal(bits(found.rows(0, 30)), bits(table.rows(0, 30)))
    files[2].unlink()
    with pytest.raises(ValueError, match="missing, the shard of rank 2 with rows 20 to 29"):
        open_table(files[0])


def test_a_shard_of_another_set_is_not_taken_for_one_of_this(tmp_path, table, rng):
    """As an interrupted run leaves it beside the finished set."""
    other = table_of(tmp_path / "source" / "other", made_up(rng, 30, 6, np.float32))
    (stray, *_) = convert_table(other, tmp_path / "other", "shards", VocabPartition(30, 3))
    convert_table(table, tmp_path / "set", "shards", VocabPartition(30, 2))
    (tmp_path / "set" / stray.name).write_bytes(stray.read_bytes())
    np.testing.assert_array_equal(bits(rows_at(tmp_path / "set")), bits(table.rows(0, 30)))
    with pytest.raises(ValueError, match=stray.name):
        open_table(tmp_path / "set" / stray.name)


def test_megatron_parts_are_equal_and_padded_with_zeros(tmp_path, table):
    values, partition = table.rows(0, 30), VocabPartition(30, 4, 48)
    files = convert_table(table, tmp_path / "parts", "megatron", partition)
    assert files == [tmp_path / "parts" / f"mp_rank_{rank:02d}" / "model.safetensors" for rank in range(4)]
    padded = np.zeros((48, 6), np.float32)
    padded[:30] = values
    for rank, path in enumerate(files):
        assert_holds(path, padded[12 * rank : 12 * rank + 12])
    convert_table(open_table(tmp_path / "parts", vocab_size=30), tmp_path / "set", "shards", VocabPartition(30, 5))
    assert_is_set(tmp_path / "set", values, VocabPartition(30, 5))


# What is there is replaced when that is asked for, and by nothing else


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_over_other_ranks(tmp_path, table, small_blocks, layout):
    values, target = table.rows(0, 30), tmp_path / "target"
    convert_table(table, target, layout, VocabPartition(30, 3))
    for world_size in (7, 2, 64, 1):
        there = open_table(target, vocab_size=30)
        convert_table(there, target, layout, VocabPartition(30, world_size, "even"), force=True)
        np.testing.assert_array_equal(bits(rows_at(target, vocab_size=30)), bits(values))
        if layout == "shards":
            assert_is_set(target, values, VocabPartition(30, world_size, "even"))
        if layout == "megatron":
            assert len([*target.iterdir()]) == world_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_replaced_without_force(tmp_path, table, rng, layout):
    convert_table(table, tmp_path / "target", layout, VocabPartition(30, 3))
    before = contents(tmp_path)
    other = open_table(tmp_path / "target", vocab_size=30)
    with pytest.raises(ValueError, match=r"target: exists; pass --force \(force=True\) to replace it"):
        convert_table(other, tmp_path / "target", layout, VocabPartition(30, 2), dtype="float16")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_another_process_finished_meanwhile_is_not_replaced_without_force(tmp_path, table, monkeypatch, layout):
    target, partition = tmp_path / "target", VocabPartition(30, 3)

    def another_is_first(*_):
        monkeypatch.undo()
        convert_table(table, target, layout, VocabPartition(30, 2), dtype="float16")

    if layout == "shards":  # whose lock keeps others out from then on
        make_files = ShardsLayout.make_files
        monkeypatch.setattr(ShardsLayout, "make_files", lambda self: (another_is_first(), make_files(self)))
    else:
        seal = table_writer._seal
        monkeypatch.setattr(table_writer, "_seal", lambda *arguments: (another_is_first(), seal(*arguments)))
    with pytest.raises(ValueError, match=r"target: exists; pass --force"):
        convert_table(table, target, layout, partition)
    assert open_table(target, vocab_size=30).dtype == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    ("layout", "foreign"),
    [
        ("shards", "model.safetensors"),
        ("shards", "notes"),
        ("shards", "manifest.json.bak"),
        ("shards", "rank-best-of-three.safetensors"),
        ("megatron", "notes"),
        ("megatron", "manifest.json"),
        # What Megatron-LM itself calls the optimizer's state, in the very folders of this layout.
        ("megatron", "mp_rank_00/model_optim_rng.pt"),
        ("megatron", "mp_rank_of_mine"),
    ],
)
@pytest.mark.parametrize("beside", ["alone", "beside a table"])
def test_folders_with_other_files_are_refused(tmp_path, table, layout, foreign, beside):
    target = tmp_path / "target"
    if beside == "beside a table":
        convert_table(table, target, layout, VocabPartition(30, 3))
    (target / foreign).parent.mkdir(parents=True, exist_ok=True)
    (target / foreign).write_text("precious")
    before = contents(tmp_path)
    for force in (False, True):
        with pytest.raises(ValueError, match="target: "):
            convert_table(table, target, layout, VocabPartition(30, 2), force=force)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_target_of_the_wrong_kind_or_in_no_folder_is_refused(tmp_path, table, layout):
    (tmp_path / "text").write_text("precious")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder" / "notes").write_text("precious")
    before = contents(tmp_path)
    wrong = {
        "no/where": "its folder does not exist",
        "text/target": "its folder does not exist",
        "fifo": "exists and is not a ",
        **(
            {"folder": "exists and is not a regular file"}
            if layout == "file"
            else {"text": "exists and is not a folder"}
        ),
    }
    for name, force in itertools.product(wrong, (False, True)):
        with pytest.raises(ValueError, match=f"{name}: {wrong[name]}"):
            convert_table(table, tmp_path / name, layout, VocabPartition(30, 2), force=force)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["shards", "megatron"])
def test_an_empty_folder_becomes_the_target_and_stays_where_the_work_fails(tmp_path, table, layout):
    target = tmp_path / "target"
    target.mkdir()
    before = contents(tmp_path)
    with pytest.raises(InterruptedError):
        convert_table(table, target, layout, VocabPartition(30, 2), progress=failing)
    assert contents(tmp_path) == before
    convert_table(table, target, layout, VocabPartition(30, 2))
    np.testing.assert_array_equal(bits(rows_at(target, vocab_size=30)), bits(table.rows(0, 30)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_stays_a_link(tmp_path, table, layout):
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    real, link = tmp_path / "real" / "table", tmp_path / "links" / "table"
    convert_table(table, real, layout, VocabPartition(30, 2), dtype="float16")
    link.symlink_to(real)
    convert_table(table, link, layout, VocabPartition(30, 3), force=True)
    assert link.is_symlink()
    np.testing.assert_array_equal(bits(rows_at(real, vocab_size=30)), bits(table.rows(0, 30)))
    assert [*(tmp_path / "links").iterdir()] == [link]
    assert [*(tmp_path / "real").iterdir()] == [real]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_may_lead_to_another_disk(tmp_path, table, layout):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    elsewhere = memory / f"pve-test-{os.getpid()}-{layout}"
    elsewhere.mkdir()
    try:
        convert_table(table, elsewhere / "table", layout, VocabPartition(30, 2), dtype="float16")
        (tmp_path / "link").symlink_to(elsewhere / "table")
        convert_table(table, tmp_path / "link", layout, VocabPartition(30, 3), force=True)
        np.testing.assert_array_equal(bits(rows_at(elsewhere / "table", vocab_size=30)), bits(table.rows(0, 30)))
        assert (tmp_path / "link").is_symlink()
    finally:
        for path in sorted(elsewhere.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        elsewhere.rmdir()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_arguments_are_refused_before_any_file_is_made(tmp_path, table, layout):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float16, .*, got 'int8'"):
        convert_table(table, tmp_path / "target", layout, VocabPartition(30, 2), dtype="int8")
    for rows in (20, 40):  # rows left out, or of nothing, must not look like a table
        with pytest.raises(ValueError, match=f"30.*{rows}|{rows}.*30"):
            convert_table(table, tmp_path / "target", layout, VocabPartition(rows, 2))
    with pytest.raises(ValueError, match="layout must be 'file' or 'shards' or 'megatron', got 'folder'"):
        convert_table(table, tmp_path / "target", "folder", VocabPartition(30, 2))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["table.bin", "table.pt", "table.json"])
def test_a_file_is_not_given_a_name_under_which_it_could_not_be_opened(tmp_path, table, name):
    with pytest.raises(ValueError, match=name):
        convert_table(table, tmp_path / name, "file", VocabPartition(30, 1))
    assert not (tmp_path / name).exists()


# When something goes wrong


def failing(*_):
    raise InterruptedError("enough")


def assert_leaves_all_as_it_was(tmp_path, work, match, error=ValueError):
    """For each layout, with a table there already and without: the work fails, and nothing has changed."""
    for layout, name in itertools.product(LAYOUTS, ("there", "new")):
        before = contents(tmp_path)
        with pytest.raises(error, match=match):
            work(tmp_path / f"{layout}-{name}", layout)
        assert contents(tmp_path) == before


@pytest.fixture
def targets(tmp_path, table):
    for layout in LAYOUTS:
        convert_table(table, tmp_path / f"{layout}-there", layout, VocabPartition(30, 3), dtype="float16")
    return tmp_path


def test_a_progress_report_that_raises(targets, table, small_blocks):
    def work(target, layout):
        convert_table(table, target, layout, VocabPartition(30, 4, 32), force=True, progress=failing)

    assert_leaves_all_as_it_was(targets, work, "enough", InterruptedError)


def test_rows_that_cannot_be_read(targets, table, monkeypatch, small_blocks):
    read = type(table).read_into

    def until_row_twenty(self, start, stop, buffer):
        if stop > 20:
            raise InterruptedError("enough")
        return read(self, start, stop, buffer)

    monkeypatch.setattr(type(table), "read_into", until_row_twenty)
    for dtype in ("float32", "float64"):

        def work(target, layout, dtype=dtype):
            convert_table(table, target, layout, VocabPartition(30, 4, 32), force=True, dtype=dtype)

        assert_leaves_all_as_it_was(targets, work, "enough", InterruptedError)


@pytest.mark.parametrize("source", ["damaged", "truncated", "missing"])
def test_a_damaged_source(targets, table, rng, small_blocks, source):
    (targets / "source" / "set").mkdir()
    files = convert_table(table, targets / "source" / "set", "shards", VocabPartition(30, 5), force=True)
    there = open_table(targets / "source" / "set")
    whole = files[3].read_bytes()
    if source == "damaged":
        files[3].write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
    elif source == "truncated":
        files[3].write_bytes(whole[:-1])
    else:
        files[3].unlink()
    match = {"damaged": "damaged, the checksum of rows 2", "truncated": "truncated, it ends 1 bytes early"}
    for dtype in ("float32", "float64"):

        def work(target, layout, dtype=dtype):
            convert_table(there, target, layout, VocabPartition(30, 4, 32), force=True, dtype=dtype)

        assert_leaves_all_as_it_was(targets, work, match.get(source, "cannot be read"))


@pytest.mark.parametrize("writes_before", [0, 3, 11])
def test_a_disk_that_is_full(targets, table, monkeypatch, small_blocks, writes_before):
    def work(target, layout):
        calls, write = itertools.count(), os.pwrite

        def until_it_is_full(*arguments):
            if next(calls) >= writes_before:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", until_it_is_full)
            convert_table(table, target, layout, VocabPartition(30, 4, 32), force=True)

    assert_leaves_all_as_it_was(targets, work, "No space left on device", OSError)


def test_writes_in_small_parts_are_carried_on(tmp_path, table, monkeypatch):
    """The operating system may write less than it is asked to."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:5]], at))
    convert_table(table, tmp_path / "set", "shards", VocabPartition(30, 4, 32))
    monkeypatch.undo()
    assert_is_set(tmp_path / "set", table.rows(0, 30), VocabPartition(30, 4, 32))


def test_what_is_not_read_back_as_written_is_noticed(targets, table, monkeypatch, small_blocks):
    read = table_writer.read_exactly

    def one_bit_off(descriptor, buffer, offset, path):
        read(descriptor, buffer, offset, path)
        buffer[-1] ^= 1

    monkeypatch.setattr(table_writer, "read_exactly", one_bit_off)

    def work(target, layout):
        convert_table(table, target, layout, VocabPartition(30, 4, 32), force=True)

    assert_leaves_all_as_it_was(targets, work, r"rows \d+ to \d+ of the table are not there as written")


@pytest.mark.parametrize("module", ["table_writer", "layouts"])
def test_a_header_that_was_not_written_is_noticed(targets, table, monkeypatch, module):
    """Of shards and parts the writer writes it with the last rows, of a file the layout does, at the end."""
    module = sys.modules[f"shared.tables.{module}"]
    write = module.write_exactly
    monkeypatch.setattr(module, "write_exactly", lambda file, data, at: at and write(file, data, at))
    for layout in LAYOUTS:
        if (layout == "file") == (module is table_writer):
            continue
        before = contents(targets)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            convert_table(table, targets / f"{layout}-there", layout, VocabPartition(30, 4, 32), force=True)
        assert contents(targets) == before


def test_leftovers_of_an_interrupted_run_are_no_table_and_are_cleared_by_the_next(tmp_path, table):
    target = tmp_path / "set"
    convert_table(table, target, "shards", VocabPartition(30, 3))
    (target / "manifest.json").rename(target / "manifest.json.0123456789abcdef.tmp")
    with pytest.raises(ValueError, match=r"set: shards without their manifest.json: the set was never finished"):
        open_table(target)
    with pytest.raises(ValueError, match="manifest.json: no such file"):
        open_table(next(target.glob("rank-00001-*")))
    convert_table(table, target, "shards", VocabPartition(30, 4, "even"))
    assert_is_set(target, table.rows(0, 30), VocabPartition(30, 4, "even"))


@pytest.mark.parametrize("layout", ["file", "megatron"])
def test_leftovers_of_a_killed_run_do_not_pile_up_beside_a_target(tmp_path, table, layout):
    script = f"""
import os, signal
from shared import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table
table = open_table({str(table.path)!r})
stop = lambda rows: os.kill(os.getpid(), signal.SIGKILL)
convert_table(table, {str(tmp_path / "target")!r}, {layout!r}, VocabPartition(30, 3), progress=stop)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert [path.name[0] for path in tmp_path.iterdir() if path.name != "source"] == ["."]
    convert_table(table, tmp_path / "target", layout, VocabPartition(30, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


ANOTHER_WRITER = """
import sys
from pathlib import Path
from shared import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

def wait(rows):
    print("writing", flush=True)
    sys.stdin.readline()

source, target = map(Path, sys.argv[1:])
convert_table(open_table(source), target, "shards", VocabPartition(30, 3), force=True, progress=wait)
"""


@pytest.mark.parametrize("before", ["nothing", "a set"])
def test_two_processes_do_not_write_one_set_together(tmp_path, table, before):
    target = tmp_path / "set"
    if before == "a set":
        convert_table(table, target, "shards", VocabPartition(30, 2), dtype="float16")
    command = [sys.executable, "-c", ANOTHER_WRITER, str(table.path), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
        assert another.stdout.readline() == b"writing\n"
        during = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="set: another process is writing there; wait for it"):
            convert_table(table, target, "shards", VocabPartition(30, 5), force=True)
        assert sorted(tmp_path.rglob("*")) == during
        another.stdin.close()
        assert another.wait(60) == 0
    assert_is_set(target, table.rows(0, 30), VocabPartition(30, 3))
    convert_table(table, target, "shards", VocabPartition(30, 5), force=True)
    assert_is_set(target, table.rows(0, 30), VocabPartition(30, 5))


def test_a_file_system_without_locks_is_not_taken_for_another_writer(tmp_path, table, monkeypatch):
    """Lustre mounted without them, for one: it may be written to or refused, but there is nobody to wait for."""

    def without_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    problem = ""
    try:
        convert_table(table, tmp_path / "set", "shards", VocabPartition(30, 3))
    except (ValueError, OSError) as error:
        problem = str(error)
    assert "another process" not in problem
    assert (tmp_path / "set").exists() != bool(problem)


@pytest.mark.parametrize("number", [2, 3])
def test_parts_stay_on_a_disk_that_cannot_exchange_names(tmp_path, table, monkeypatch, number):
    """NFS, for one; what can be helped there is an error or an interrupt between the renamings."""
    target, rename, calls = tmp_path / "target", os.rename, []
    convert_table(table, target, "megatron", VocabPartition(30, 3), dtype="float16")

    def without(*_, **__):
        raise OSError("no such library")

    def interrupted_once(left, right):
        calls.append(left)
        if len(calls) == number:
            raise KeyboardInterrupt
        rename(left, right)

    monkeypatch.setattr(ctypes, "CDLL", without)
    monkeypatch.setattr(os, "rename", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        convert_table(table, target, "megatron", VocabPartition(30, 2), force=True)
    assert open_table(target, vocab_size=30).dtype == ("float16" if number == 2 else "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_leftover_of_another_user_is_left_where_it_is(tmp_path, table, monkeypatch):
    leftover, opened = tmp_path / ".target.0123456789abcdef.tmp", os.open
    leftover.write_text("of someone else")

    def refusing(path, *arguments, **options):
        if str(path) == str(leftover):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    convert_table(table, tmp_path / "target", "file", VocabPartition(30, 1))
    assert open_table(tmp_path / "target").vocab_size == 30


def test_the_folder_one_is_in_is_refused_as_a_file_in_clear_words(tmp_path, table, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(table.path), "-o", "."]) == 2
    assert ".: exists and is not a regular file" in capsys.readouterr().err


def test_the_folder_one_is_in_takes_megatron_parts_or_refuses_them_in_clear_words(tmp_path, table, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main(["shard", str(table.path), "-o", ".", "--world-size", "2", "--layout", "megatron"])
    assert "empty name" not in capsys.readouterr().err


# Stopped at any moment

# Converts B over A (or over nothing), again and again, in a forked process that is stopped before its first call of the
# operating system, then before its second, and so on until it is through; says what is there afterwards. fsync does not wait
# for the disk here: whoever kills a process leaves the kernel's memory of the files alone.
STOPPED = """
import errno, itertools, json, os, shutil, signal, sys
from pathlib import Path
from shared import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

folder, layout, how, before = Path(sys.argv[1]), *sys.argv[2:]
target = folder / "place" / "target"
os.fsync = lambda descriptor: None
partitions = {"A": VocabPartition(30, 2), "B": VocabPartition(23, 3, 36)}
tables = {name: open_table(folder / name) for name in partitions}
NAMED = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "fcntl.flock"}

def write(name, force=True):
    convert_table(tables[name], target, layout, partitions[name], force=force)

def found():
    problem = "no such file or folder" if not target.exists() else "other rows"
    for name, table in tables.items():
        try:
            there = open_table(target, vocab_size=table.vocab_size)
            if there.rows(0, there.vocab_size).tobytes() == table.rows(0, table.vocab_size).tobytes():
                return name
        except ValueError as error:
            if "must be that of the table" not in str(error):
                problem = str(error)
    return problem

def names():
    return sorted(str(path.relative_to(target.parent)) for path in target.parent.rglob("*"))

def stop_before(number, report):
    calls = itertools.count(1)
    def step(name, arguments=()):
        if name in NAMED and next(calls) == number:
            os.write(report, f"{name}{arguments}".encode())
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if how == "interrupted" else OSError(errno.ENOSPC, "No space left on device")
    def counted(name, call):
        def with_step(*arguments):
            step(name)
            return call(*arguments)
        return with_step
    for name in ("pwrite", "preadv", "fsync", "posix_fadvise"):
        NAMED.add(name)
        setattr(os, name, counted(name, getattr(os, name)))
    sys.addaudithook(step)

write("B")  # what is imported late is there from now on
for number in itertools.count(1):
    for path in target.parent.iterdir():
        if path != target or before == "nothing" or layout != "shards":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if before == "A":
        write("A")
    at_first = names()
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
    outcome = {"before": call, "status": status, "found": found(), "added": sorted({*names()} - {*at_first})}
    outcome["at_first"] = len(at_first)
    if before == "nothing" and outcome["found"] != "B":
        try:
            write("B", force=False)
            outcome["next"] = found(), len(names())
        except ValueError as error:
            outcome["next"] = str(error), len(names())
    print(json.dumps(outcome))
    if not call:
        break
"""


def stopped(folder, rng, *arguments):
    for name, rows in (("A", 30), ("B", 23)):
        table_of(folder / name, made_up(rng, rows, 6, np.float16))
    (folder / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(folder), *arguments], capture_output=True, text=True, check=True
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 20
    assert [outcome["before"] for outcome in outcomes].index("") == len(outcomes) - 1
    assert (outcomes[0]["status"] != 0, outcomes[-1]["status"], outcomes[-1]["found"]) == (True, 0, "B")
    return outcomes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["killed", "interrupted", pytest.param("full", marks=pytest.mark.slow)])
def test_whenever_it_is_stopped_the_old_table_or_the_new_one_is_there(tmp_path, rng, layout, how):
    outcomes = stopped(tmp_path, rng, layout, how, "A")
    assert [each for each in outcomes if each["found"] not in ("A", "B")] == []
    assert {each["found"] for each in outcomes} == {"A", "B"}
    assert [each for each in outcomes if each["status"] == 0 and each["found"] != "B"] == []
    if how != "killed":
        assert [each for each in outcomes if each["found"] == "A" and each["added"]] == []
        failed = [each for each in outcomes if each["status"] != 0]
        assert [each for each in failed if any(".tmp" in name for name in each["added"])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted", "full"])
def test_whenever_it_is_stopped_nothing_or_the_new_table_is_there(tmp_path, rng, layout, how):
    outcomes = stopped(tmp_path, rng, layout, how, "nothing")
    nothing = ["no such file or folder"]
    if how == "killed" and layout == "shards":
        nothing += ["shards without their manifest.json", "no safetensors file in it"]
    strange = [each for each in outcomes if each["found"] != "B" and not any(text in each["found"] for text in nothing)]
    assert strange == []
    assert [each for each in outcomes if each["status"] == 0 and each["found"] != "B"] == []
    if how != "killed":
        assert [each for each in outcomes if each["found"] != "B" and each["added"]] == []
    whole = {"file": 1, "shards": 1 + 1 + 3, "megatron": 1 + 3 + 3}[layout]
    for each in outcomes:
        if each["found"] != "B":
            assert each["next"][0] == "B"
            # What a killed run left beside a file or a folder is another test's.
            assert each["next"][1] == whole or (how == "killed" and layout != "shards"), each


# Conversions without end, A over B over A, in forked processes that are killed at random; here the disk is waited for.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from shared import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

folder, layout, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
target = folder / "place" / "target"
partitions = {"A": VocabPartition(2000, 5), "B": VocabPartition(1501, 3, "even")}
tables = {name: open_table(folder / name) for name in partitions}
rows = {name: table.rows(0, table.vocab_size).tobytes() for name, table in tables.items()}

def write(name):
    convert_table(tables[name], target, layout, partitions[name], force=True)

def files():
    return sorted(str(path.relative_to(target.parent)) for path in target.parent.rglob("*") if path.is_file())

random.seed(0)
started = time.perf_counter()
write("A")
write("B")
longest = 3 * (time.perf_counter() - started)
for _ in range(kills):
    child = os.fork()
    if not child:
        try:
            while True:
                write("A")
                write("B")
        finally:
            os._exit(1)
    time.sleep(random.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = files()
    there = open_table(target)
    data = there.rows(0, there.vocab_size).tobytes()
    found = [name for name in rows if rows[name] == data]
    print(json.dumps({"status": status, "found": found, "left": left}))
    for path in target.parent.glob(".*.tmp"):
        path.unlink()
write("A")
print(json.dumps({"status": 0, "found": ["A"], "left": files()}))
"""


@pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["file", "shards"])
def test_killed_at_random_it_leaves_one_table_whole(tmp_path, rng, layout, kills):
    for name, rows in (("A", 2000), ("B", 1501)):
        table_of(tmp_path / name, made_up(rng, rows, 256, np.float32))
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path), layout, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *outcomes, last = map(json.loads, done.stdout.splitlines())
    assert [outcome["status"] for outcome in outcomes] == [-9] * kills
    assert [outcome for outcome in outcomes if outcome["found"] not in (["A"], ["B"])] == []
    # The test would be worth nothing if it had always been killed between two conversions.
    assert any(len(outcome["left"]) not in (1, 4, 6) for outcome in outcomes)
    assert len(last["left"]) == {"file": 1, "shards": 6}[layout]


# Several processes, one table


class Exchange:
    """What lets threads stand for processes: each gives something and gets what all gave, as JSON carries it."""

    def __init__(self, processes):
        self.barrier = threading.Barrier(processes, timeout=10)
        self.given = [None] * processes

    def of(self, process):
        def exchange(mine):
            self.given[process] = json.dumps(mine)
            self.barrier.wait()
            everyones = [json.loads(text) for text in self.given]
            self.barrier.wait()
            return everyones

        return exchange


RANKS = [[0, 2], [1], [], [4, 3]]
"""Who writes what of a table over five ranks: two processes several ranks' rows, one none."""


def together(path, values, change=lambda process: {}, **options):
    """Four processes write a table; what each of them raised, or None."""
    exchange, outcomes = Exchange(len(RANKS)), [None] * len(RANKS)

    def fill(first, last, buffer):
        buffer[:] = bits(values[first:last]).data

    def run(process):
        arguments = {
            "path": path,
            "tensor": "wte.weight",
            "dtype": "bfloat16",
            "emb_size": 6,
            "partition": VocabPartition(30, 5, 40),
            "ranks": RANKS[process],
            "fill": fill,
            "force": False,
            **options,
            **change(process),
        }
        try:
            write_together(**arguments, process=process, exchange=exchange.of(process))
        except Exception as error:
            outcomes[process] = error

    threads = [threading.Thread(target=run, args=(process,)) for process in range(len(RANKS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def values(rng):
    return made_up(rng, 30, 6, ml_dtypes.bfloat16)


@pytest.fixture(params=["set", "table.safetensors"])
def target(request, tmp_path):
    return tmp_path / request.param


def test_processes_write_a_table_together(target, values, small_blocks):
    assert together(target, np.zeros_like(values)) == [None] * 4
    assert together(target, values, force=True) == [None] * 4
    if target.name == "set":
        assert_is_set(target, values, VocabPartition(30, 5, 40))
    else:
        assert_holds(target, values)
        np.testing.assert_array_equal(bits(rows_at(target)), bits(values))
    assert [*target.parent.iterdir()] == [target]


def test_without_force_all_processes_are_refused(target, values):
    together(target, values)
    before = contents(target.parent)
    outcomes = together(target, np.zeros_like(values))
    assert all("exists; pass --force (force=True)" in str(error) for error in outcomes)
    assert [str(error).startswith("process 0 could not write its part: ") for error in outcomes] == [False, *[True] * 3]
    assert contents(target.parent) == before


@pytest.mark.parametrize("before", ["nothing", "a table"])
@pytest.mark.parametrize("process", [0, 1, 3])
def test_one_process_failing_fails_all_and_leaves_all_as_it_was(target, values, small_blocks, before, process):
    if before == "a table":
        together(target, np.zeros_like(values))
    there = contents(target.parent)
    outcomes = together(target, values, lambda p: {"fill": failing} if p == process else {}, force=True)
    assert isinstance(outcomes.pop(process), InterruptedError)
    assert [str(error) for error in outcomes] == [f"process {process} could not write its part: enough"] * 3
    assert {type(error) for error in outcomes} == {ValueError}
    assert contents(target.parent) == there


@pytest.mark.parametrize("step", ["check_target", "make_files", "finish"])
@pytest.mark.parametrize("before", ["nothing", "a table"])
def test_the_first_process_failing_at_its_own_steps_fails_all(target, values, monkeypatch, before, step):
    if before == "a table":
        together(target, np.zeros_like(values))
    there = contents(target.parent)
    for layout in LAYOUTS.values():
        monkeypatch.setattr(layout, step, failing)
    outcomes = together(target, values, force=True)
    assert isinstance(outcomes.pop(0), InterruptedError)
    assert [str(error) for error in outcomes] == ["process 0 could not write its part: enough"] * 3
    assert contents(target.parent) == there


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("path", {"path": "elsewhere.safetensors"}),
        ("tensor_name", {"tensor": "wpe.weight"}),
        ("dtype", {"dtype": "float16"}),
        ("sizes", {"emb_size": 7}),
        ("sizes", {"partition": VocabPartition(30, 5)}),
        ("sizes", {"partition": VocabPartition(31, 5, 40)}),
        ("sizes", {"partition": VocabPartition(30, 4, 40)}),
        ("force", {"force": True}),
    ],
)
def test_processes_that_disagree_are_all_refused(target, values, what, change):
    outcomes = together(target, values, lambda process: change if process == 2 else {})
    assert {type(error) for error in outcomes} == {ValueError}
    (message,) = {str(error) for error in outcomes}
    assert message.startswith(f"the ranks disagree about {what}: ")
    assert "on rank 2" in message
    assert [*target.parent.iterdir()] == []


def test_a_rank_that_nobody_wrote_is_noticed(target, values):
    outcomes = together(target, values, lambda process: {"ranks": []} if process == 1 else {})
    assert [type(error) for error in outcomes] == [ValueError] * 4
    assert [*target.parent.iterdir()] == []


def test_one_process_alone_writes_together_with_itself(target, values):
    def fill(first, last, buffer):
        buffer[:] = bits(values[first:last]).data

    arguments = ("wte.weight", "bfloat16", 6, VocabPartition(30, 3), range(3), fill)
    write_together(str(target), *arguments, force=False)
    np.testing.assert_array_equal(bits(rows_at(target)), bits(values))


# Memory

# ru_maxrss would not do: a new process begins with that of the one that started it, and pytest's may be large.
PEAK = """
import sys
from pathlib import Path
import numpy as np
from shared import VocabPartition
from shared.bits import STORED_DTYPES
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def growth_of(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    kept = work()
    return status("VmHWM") - before

folder = Path(sys.argv[1])
table = open_table(folder / "table.safetensors")
if sys.argv[2] == "read":
    dtype = STORED_DTYPES[sys.argv[3]]
    table.padded_rows(VocabPartition(8, 4, 12), 0, dtype)  # what is imported late is there from now on
    print(growth_of(lambda: table.padded_rows(VocabPartition(table.vocab_size, 8), 3, dtype)))
else:
    small = open_table(folder / "small.safetensors")
    convert_table(small, folder / "warm", "shards", VocabPartition(30, 3), dtype="float16")
    v = table.vocab_size
    print(growth_of(lambda: convert_table(table, folder / "set", "shards", VocabPartition(v, 7, "even"))))
    there = open_table(folder / "set")
    again = lambda: convert_table(there, folder / "set", "shards", VocabPartition(v, 4), dtype="float16", force=True)
    print(growth_of(again))
"""


def peaks(folder, *arguments):
    command = [sys.executable, "-c", PEAK, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path, rng):
    """A gibibyte, in far less than a tenth of that."""
    blocks, rows, columns = 64, 4096, 1024
    block = rng.standard_normal((rows, columns), np.float32)
    with open(tmp_path / "table.safetensors", "wb") as file:
        file.write(header_bytes("wte.weight", "float32", (blocks * rows, columns), {}))
        for number in range(blocks):
            (block + np.float32(number)).tofile(file)
    table_of(tmp_path / "small.safetensors", block[:30])
    growths = peaks(tmp_path, "convert")
    assert len(growths) == 2
    assert max(growths) < 100e6
    table = open_table(tmp_path / "set")
    for number in (0, 17, 63):
        found = table.rows(number * rows, (number + 1) * rows)
        np.testing.assert_array_equal(found, cast(block + np.float32(number), DTYPES["float16"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_reading_one_ranks_rows_takes_little_more_memory_than_they_do(tmp_path, dtype):
    rows, columns = 8 * 8192, 1024
    header = header_bytes("wte.weight", "float32", (rows, columns), {})
    with open(tmp_path / "table.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * columns * 4)  # zeros that take no room on the disk
    shard = rows // 8 * columns * STORED_DTYPES[dtype].itemsize
    (growth,) = peaks(tmp_path, "read", dtype)
    assert 0.9 * shard <= growth <= 1.5 * shard
