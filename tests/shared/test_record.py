"""A record that is not whole, or not a record, is refused with one clear line."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shared.proof.case import sha256
from shared.proof.diff import compare_records
from shared.proof.record import Record, RecordWriter, writable_file
from shared.proof.rows import Rows


def rewrite(path, change):
    """Let ``change(tensors, metadata)`` alter a record, its checksums left as they are."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_it_carries_sizes_versions_and_checksums(make_record, case):
    record = make_record("oracle")
    assert (record.vocab_size, record.emb_size, record.dtype, record.world_size) == (30, 6, "bfloat16", 3)
    assert record.ids_shape == (3, 6)
    assert record.versions["numpy"] == np.__version__
    assert record.checksums == case.checksums
    assert len(record.sha256) == 2 * 7 + 2


def test_rows_lose_nothing():
    array = np.array([[0.0, -0.0], [0.0, 0.0], [np.nan, 1.0]])
    rows = Rows.of(array)
    assert rows.total == 3
    assert rows.index.tolist() == [0, 2]
    np.testing.assert_array_equal(rows.take(np.arange(3)).view(np.uint64), array.view(np.uint64))


def test_every_truncation_is_refused(make_record):
    path = make_record("left").path
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 100, *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Record.open(path)


def test_every_flipped_byte_is_refused(make_record, tmp_path):
    left, path = make_record("left"), make_record("right").path
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged record, the checksum"):
            compare_records(left, Record.open(path))


def test_foreign_files_are_refused(tmp_path):
    save_file({"weight": np.ones((2, 2))}, tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match=r"table.safetensors: not a record of `pve record`"):
        Record.open(tmp_path / "table.safetensors")
    (tmp_path / "text").write_text("hello, this is no record at all")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Record.open(tmp_path / "text")
    with pytest.raises(ValueError, match="no such file"):
        Record.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 31),
        ("vocab_size", float("nan")),
        ("world_size", 0),
        ("world_size", 2),
        ("world_size", 2**40),
        ("emb_size", -1),
        ("padding_idx", "5"),
        ("versions", [1]),
        ("checksums", {"ids": 1}),
        ("source", None),
        ("dtype", "int8"),
        ("backend", None),
        ("ids_shape", 7),
        ("ids_shape", ["a"]),
        ("ids_shape", [-1, 3]),
        ("sha256", {}),
    ],
)
def test_headers_that_do_not_hold_together_are_refused(make_record, field, value):
    path = make_record("left").path

    def change(tensors, metadata):
        metadata["header"] = json.dumps({**json.loads(metadata["header"]), field: value})

    rewrite(path, change)
    with pytest.raises(ValueError, match="damaged record"):
        Record.open(path)


def test_a_size_that_the_rows_do_not_have_is_refused(make_record):
    records = [make_record(name) for name in ("left", "right")]
    for record in records:
        rewrite(
            record.path,
            lambda tensors, metadata: metadata.update(
                header=json.dumps(
                    {**json.loads(metadata["header"]), "vocab_size": 3 * 2**50, "padded_vocab_size": 3 * 2**50}
                )
            ),
        )
    with pytest.raises(ValueError, match="row hashes do not fit the table"):
        compare_records(*(Record.open(record.path) for record in records))


def test_ids_that_contradict_the_header_are_refused(make_record):
    records = [make_record(name) for name in ("left", "right")]
    for record in records:

        def other_ids(tensors, metadata):
            tensors["ids"] = tensors["ids"][::-1].copy()
            header = json.loads(metadata["header"])
            header["sha256"]["ids"] = sha256(tensors["ids"])
            metadata["header"] = json.dumps(header)

        rewrite(record.path, other_ids)
    with pytest.raises(ValueError, match="its ids do not match the checksum in its header"):
        compare_records(*(Record.open(record.path) for record in records))


def test_only_regular_files_are_replaced_and_links_are_followed(case, tmp_path, make_record):
    os.mkfifo(tmp_path / "fifo")
    for place in ("fifo", "."):
        with pytest.raises(ValueError, match="not a regular file"):
            writable_file(tmp_path / place)
    with pytest.raises(ValueError, match="its folder does not exist"):
        writable_file(tmp_path / "no" / "where")
    real = make_record("real").path
    (tmp_path / "link").symlink_to(real)
    assert writable_file(tmp_path / "link") == real.resolve()


def test_other_versions_and_missing_headers_are_refused(make_record):
    path = make_record("left").path
    rewrite(path, lambda tensors, metadata: metadata.update(version="2"))
    with pytest.raises(ValueError, match="a record of version 2"):
        Record.open(path)
    rewrite(path, lambda tensors, metadata: (metadata.update(version="5"), metadata.pop("header")))
    with pytest.raises(ValueError, match="damaged record"):
        Record.open(path)


def test_rows_that_do_not_fit_their_sizes_are_refused(make_record):
    record = make_record("left", lambda arrays: arrays.update({"forward.0": np.ones((40, 6), arrays["sum"].dtype)}))
    with pytest.raises(ValueError, match="forward.0 does not fit its sizes"):
        record.rows("forward.0")


def test_a_record_that_lacks_something_is_not_written(case, tmp_path):
    writer = RecordWriter(case, "torch", {})
    with pytest.raises(ValueError, match="the record lacks forward.0"):
        writer.write(tmp_path / "record")
    assert not list(tmp_path.glob("*record*"))
