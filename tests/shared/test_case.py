"""Reading tables and ids, and refusing what is not one."""

import os

import numpy as np
import pytest
from table_files import save

from shared.proof.case import Case, CaseOptions, build_case


@pytest.fixture
def values(rng):
    return rng.standard_normal((40, 4)).astype(np.float32)


@pytest.fixture
def built(tmp_path, values):
    """Build a case of a table in a file, by default, and read it back."""
    weights = save(tmp_path / "t.safetensors", {"emb": values, "bias": np.ones(4), "steps": np.ones((2, 2), np.int64)})

    def build(**options):
        case = build_case(CaseOptions(**{"weights": weights, "world_size": 4, **options}), tmp_path)
        assert Case.load(tmp_path) == case
        return case

    return build


@pytest.fixture
def refused(built):
    def check(match, **options):
        with pytest.raises(ValueError, match=match):
            built(**options)

    return check


def test_a_given_table_is_used_where_it_is_or_cast_once(built, values, tmp_path):
    case = built()
    assert case.weights == str(tmp_path / "t.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()
    np.testing.assert_array_equal(case.rank_rows(3), values[30:])
    cast = built(dtype="float16")
    np.testing.assert_array_equal(cast.rank_rows(1), values[10:20].astype(np.float16))
    assert "cast to float16" in cast.source


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.dtype(">i4"), np.dtype(">u8")])
def test_ids_of_any_integer_dtype(built, tmp_path, dtype):
    ids = np.array([[0, 39, 40], [7, 7, np.iinfo(dtype).max]], dtype)
    np.save(tmp_path / "ids.npy", ids)
    case = built(ids=tmp_path / "ids.npy")
    stored = case.batch_array("ids")
    assert stored.dtype == np.int64
    np.testing.assert_array_equal(case.partition.owner(stored), case.partition.owner(ids))


def test_bad_ids_are_refused(refused, tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(10**3))
    larger_than_memory = path.read_bytes().replace(b"(1000,), }" + b" " * 14, b"(" + b"9" * 17 + b",), } ")
    np.save(path, np.array([{"a": 1}], object))
    pickled = path.read_bytes()
    cut_short = b"\x93NUMPY\x01\x00\x20\x00{'descr': '<i8', 'shape': (("
    for garbage in (b"PK\x03\x04garbage", cut_short, larger_than_memory, pickled):
        path.write_bytes(garbage)
        refused("not a readable .npy file", ids=path)
    np.save(path, np.ones(3))
    refused("ids must be one array of integers, got float64", ids=path)
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))
    refused("ids must be one array of integers", ids=path)


def test_text_becomes_ids(built, refused, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 9, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "text"
    both = {"tokenizer": tmp_path / "tokenizer.json", "text": text}
    refused("text: no such file", **both)
    os.mkfifo(text)
    refused("text: not a file", **both)
    text.unlink()
    text.write_bytes(b"\xff\xfe\x00")
    refused("text: not a readable file of UTF-8 text", **both)
    text.write_text("a b b x")
    np.testing.assert_array_equal(built(**both).batch_array("ids"), [[3, 9, 9, 0]])
    refused("give ids in one way", ids=tmp_path / "ids.npy", **both)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    refused("not a tokenizer.json", **both)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("vocab_size must be that of the table: asked for 41", {"vocab_size": 41}),
        ("emb_size must be that of the table", {"emb_size": 5}),
        ("--tensor needs --weights", {"weights": None, "tensor": "x"}),
        ("emb_size must be at least 1", {"weights": None, "vocab_size": 8, "emb_size": -1}),
    ],
)
def test_options_out_of_range_are_refused(refused, match, options):
    refused(match, **options)
