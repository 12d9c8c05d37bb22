"""Reading tables and ids, and refusing what is not one."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.proof.case import Case, CaseOptions, build_case


@pytest.fixture
def table(tmp_path, rng):
    values = rng.standard_normal((40, 4)).astype(np.float32)
    save_file({"emb": values, "bias": np.ones(4), "steps": np.ones((2, 2), int)}, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors", values


def refused(tmp_path, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        build_case(CaseOptions(**options), tmp_path)


def test_a_given_table_is_used_where_it_is(table, tmp_path):
    case = build_case(CaseOptions(weights=table[0], world_size=4), tmp_path)
    assert case.weights == str(table[0])
    assert not (tmp_path / "weights.safetensors").exists()
    assert Case.load(tmp_path) == case
    np.testing.assert_array_equal(case.rank_rows(3), table[1][30:])


def test_a_cast_rounds_once(table, tmp_path):
    case = build_case(CaseOptions(weights=table[0], dtype="float16", world_size=4), tmp_path)
    np.testing.assert_array_equal(case.rank_rows(1), table[1][10:20].astype(np.float16))
    assert "cast to float16" in case.source


def test_sizes_must_be_those_of_the_table(table, tmp_path):
    refused(tmp_path, "vocab_size must be that of the table: asked for 41", weights=table[0], vocab_size=41)
    refused(tmp_path, "emb_size must be that of the table", weights=table[0], emb_size=5)
    refused(tmp_path, "vocab_size=40 over world_size=3", weights=table[0], world_size=3)


@pytest.mark.parametrize("garbage", [b"PK\x03\x04garbage", b"\x93NUMPY\x01\x00\x20\x00{'descr': '<i8', 'shape': (("])
def test_garbage_for_ids_is_refused(table, tmp_path, garbage):
    (tmp_path / "ids.npy").write_bytes(garbage)
    refused(tmp_path, "not a readable .npy file", weights=table[0], ids=tmp_path / "ids.npy")


def test_ids_larger_than_memory_are_refused(table, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(10**3))
    content = (tmp_path / "ids.npy").read_bytes().replace(b"(1000,), }" + b" " * 14, b"(" + b"9" * 17 + b",), } ")
    (tmp_path / "ids.npy").write_bytes(content)
    refused(tmp_path, "not a readable .npy file", weights=table[0], ids=tmp_path / "ids.npy")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, np.int64, np.dtype(">i4"), np.dtype(">u8")])
def test_ids_of_any_integer_dtype(table, tmp_path, dtype):
    ids = np.array([[0, 39, 40], [7, 7, np.iinfo(dtype).max]], dtype)
    np.save(tmp_path / "ids.npy", ids)
    case = build_case(CaseOptions(weights=table[0], ids=tmp_path / "ids.npy", world_size=2), tmp_path)
    stored = case.batch_array("ids")
    assert stored.dtype == np.int64
    np.testing.assert_array_equal(case.partition.owner(stored), case.partition.owner(ids))


def test_bad_ids_are_refused(table, tmp_path):
    path = tmp_path / "ids.npy"
    refused(tmp_path, "not a readable .npy file", weights=table[0], ids=path)
    path.write_bytes(b"")
    refused(tmp_path, "not a readable .npy file", weights=table[0], ids=path)
    np.save(path, np.array([{"a": 1}], object))
    refused(tmp_path, "not a readable .npy file", weights=table[0], ids=path)
    for bad in (np.ones(3), np.array([True])):
        np.save(path, bad)
        refused(tmp_path, "ids must be one array of integers", weights=table[0], ids=path)
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))
    refused(tmp_path, "ids must be one array of integers", weights=table[0], ids=path)


def test_text_becomes_ids(table, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 9, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("a b b x")
    case = build_case(
        CaseOptions(weights=table[0], tokenizer=tmp_path / "tokenizer.json", text=tmp_path / "text"), tmp_path
    )
    np.testing.assert_array_equal(case.batch_array("ids"), [[3, 9, 9, 0]])
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    both = {"weights": table[0], "tokenizer": tmp_path / "tokenizer.json", "text": tmp_path / "text"}
    refused(tmp_path, "not UTF-8 text", **both)
    refused(tmp_path, "no such file", **{**both, "text": tmp_path / "nothing"})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    (tmp_path / "text").write_text("a")
    refused(tmp_path, "not a tokenizer.json", **both)
    refused(tmp_path, "need each other", weights=table[0], text=tmp_path / "text")
    refused(tmp_path, "give ids in one way", ids=tmp_path / "ids.npy", **both)


def test_other_options_out_of_range_are_refused(tmp_path):
    refused(tmp_path, "--tensor needs --weights", tensor="x")
    refused(tmp_path, "vocab_size must be at least 1", vocab_size=0)
    refused(tmp_path, "emb_size must be at least 1", vocab_size=8, emb_size=-1)
    refused(tmp_path, "padding_idx must be an id", vocab_size=16, emb_size=2, padding_idx=16)
