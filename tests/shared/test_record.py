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
    change(tensors, metadata, header)
    save_file(tensors, path, {**metadata, "header": json.dumps(header)})


def refused(path, match):
    with pytest.raises(ValueError, match=match):
        Record.open(path)


@pytest.fixture
def path(make_record):
    return make_record("left").path


def test_rows_lose_nothing():
    array = np.array([[0.0, -0.0], [0.0, 0.0], [np.nan, 1.0]])
    rows = Rows.of(array)
    assert (rows.total, rows.index.tolist()) == (3, [0, 2])
    np.testing.assert_array_equal(rows.take(np.arange(3)).view(np.uint64), array.view(np.uint64))


def test_every_truncation_and_every_flipped_byte_is_refused(make_record, path):
    other, whole = make_record("right"), path.read_bytes()
    for size in [0, 7, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, "not a whole safetensors file")
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged record, the checksum"):
            compare_records(other, Record.open(path))


def set_header(**fields):
    return lambda tensors, metadata, header: header.update(fields)


def other_ids(tensors, metadata, header):
    tensors["ids"] = tensors["ids"][::-1].copy()
    header["sha256"]["ids"] = sha256(tensors["ids"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors, metadata, header: metadata.update(format="a table"), "not a record of `pve record`"),
        (lambda tensors, metadata, header: metadata.update(version="2"), "a record of version 2"),
        (lambda tensors, metadata, header: header.pop("backend"), "missing 1 required"),
        (set_header(vocab_size=31), "the least such size is 33"),
        (set_header(world_size=2), "tensors and checksums do not match"),
        (set_header(vocab_size=2**42, padded_vocab_size=2**42, world_size=2**40), "invalid number of tensors"),
        *((set_header(ids_shape=wrong), "damaged record") for wrong in (7, ["a"], [-1, 3])),
        (set_header(dtype="int8"), "invalid dtype"),
        (set_header(padding_idx="5"), "padding_idx must be an integer"),
        (set_header(versions=[1]), "damaged record"),
        (set_header(checksums={"ids": 1}), "invalid text"),
        (other_ids, "ids are not those of the case"),
    ],
)
def test_headers_that_do_not_hold_together_are_refused(path, change, match):
    rewrite(path, change)
    refused(path, f"left.record: .*{match}")


def test_sizes_that_contradict_what_is_there_are_refused(make_record):
    record = make_record("left", lambda arrays: arrays.update({"forward.0": np.ones((40, 6), arrays["sum"].dtype)}))
    with pytest.raises(ValueError, match="forward.0 does not fit its sizes"):
        record.rows("forward.0")
    records = [record, make_record("right")]
    for each in records:
        rewrite(each.path, set_header(vocab_size=3 * 2**50, padded_vocab_size=3 * 2**50))
    with pytest.raises(ValueError, match="row hashes do not fit the table"):
        compare_records(*(Record.open(each.path) for each in records))


def test_only_regular_files_are_replaced_and_links_are_followed(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    for place, match in (("fifo", "regular file"), (".", "regular file"), ("no/where", "its folder does not exist")):
        with pytest.raises(ValueError, match=match):
            writable_file(tmp_path / place)
    (tmp_path / "link").symlink_to(path)
    assert writable_file(tmp_path / "link") == path.resolve()


def test_a_record_that_lacks_something_is_not_written(case, tmp_path):
    with pytest.raises(ValueError, match="the record lacks forward.0"):
        RecordWriter(case, "torch", {}).write(tmp_path / "record")
    assert not list(tmp_path.glob("*record*"))
