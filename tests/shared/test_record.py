"""A record that is not whole, or not a record, is refused with one clear line."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shared.proof.case import sha256
from shared.proof.diff import compare_records
from shared.proof.record import Record, RecordWriter, Rows, writable_file


def rewrite(path, change):
    """Let ``change(tensors, metadata, header)`` alter a record, its checksums left as they are."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors, header = load_file(path), json.loads(metadata["header"])
    metadata["header"] = header
    change(tensors, metadata, header)
    save_file(tensors, path, {name: text if name != "header" else json.dumps(text) for name, text in metadata.items()})


def refused(path, match):
    with pytest.raises(ValueError, match=match):
        Record.open(path)


@pytest.fixture
def path(make_record):
    return make_record("left").path


def test_it_carries_sizes_versions_and_checksums(make_record, case):
    record = make_record("oracle")
    assert (record.vocab_size, record.emb_size, record.dtype, record.world_size) == (30, 6, "bfloat16", 3)
    assert (record.ids_shape, record.versions["numpy"]) == ((3, 6), np.__version__)
    assert record.checksums == case.checksums
    assert len(record.sha256) == 2 * 7 + 2


def test_rows_lose_nothing():
    array = np.array([[0.0, -0.0], [0.0, 0.0], [np.nan, 1.0]])
    rows = Rows.of(array)
    assert (rows.total, rows.index.tolist()) == (3, [0, 2])
    np.testing.assert_array_equal(rows.take(np.arange(3)).view(np.uint64), array.view(np.uint64))


def test_every_truncation_and_every_flipped_byte_is_refused(make_record, path):
    other, whole = make_record("right"), path.read_bytes()
    for size in [0, 1, 7, 8, 100, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, "not a whole safetensors file")
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged record, the checksum"):
            compare_records(other, Record.open(path))


def test_foreign_files_are_refused(tmp_path):
    save_file({"weight": np.ones((2, 2))}, tmp_path / "table.safetensors")
    refused(tmp_path / "table.safetensors", r"table.safetensors: not a record of `pve record`")
    (tmp_path / "text").write_text("hello, this is no record at all")
    refused(tmp_path / "text", "not a whole safetensors file")
    refused(tmp_path / "nothing", "no such file")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("vocab_size", wrong) for wrong in (31, float("nan"))),
        *(("world_size", wrong) for wrong in (0, 2, 2**40)),
        *(("ids_shape", wrong) for wrong in (7, ["a"], [-1, 3])),
        *(("emb_size", -1), ("padding_idx", "5"), ("dtype", "int8"), ("sha256", {})),
        *(("backend", None), ("source", None), ("versions", [1]), ("checksums", {"ids": 1})),
    ],
)
def test_headers_that_do_not_hold_together_are_refused(path, field, value):
    rewrite(path, lambda tensors, metadata, header: header.update({field: value}))
    refused(path, "damaged record")


def test_other_versions_and_missing_headers_are_refused(path):
    rewrite(path, lambda tensors, metadata, header: metadata.update(version="2"))
    refused(path, "a record of version 2")
    rewrite(path, lambda tensors, metadata, header: (metadata.update(version="5"), metadata.pop("header")))
    refused(path, "damaged record")


def other_ids(tensors, metadata, header):
    tensors["ids"] = tensors["ids"][::-1].copy()
    header["sha256"]["ids"] = sha256(tensors["ids"])


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (
            "row hashes do not fit the table",
            lambda tensors, metadata, header: header.update(vocab_size=3 * 2**50, padded_vocab_size=3 * 2**50),
        ),
        ("ids are not those of the case", other_ids),
    ],
)
def test_headers_that_contradict_what_is_there_are_refused(make_record, match, change):
    records = [make_record(name) for name in ("left", "right")]
    for record in records:
        rewrite(record.path, change)
    with pytest.raises(ValueError, match=match):
        compare_records(*(Record.open(record.path) for record in records))


def test_rows_that_do_not_fit_their_sizes_are_refused(make_record):
    record = make_record("left", lambda arrays: arrays.update({"forward.0": np.ones((40, 6), arrays["sum"].dtype)}))
    with pytest.raises(ValueError, match="forward.0 does not fit its sizes"):
        record.rows("forward.0")


def test_only_regular_files_are_replaced_and_links_are_followed(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    for place, match in (("fifo", "regular file"), (".", "regular file"), ("no/where", "its folder does not exist")):
        with pytest.raises(ValueError, match=match):
            writable_file(tmp_path / place)
    (tmp_path / "link").symlink_to(path)
    assert writable_file(tmp_path / "link") == path.resolve()


def test_a_record_that_lacks_something_is_not_written(case, tmp_path):
    writer = RecordWriter(case, "torch", {})
    with pytest.raises(ValueError, match="the record lacks forward.0"):
        writer.write(tmp_path / "record")
    assert not list(tmp_path.glob("*record*"))
