"""Who owns what."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import VocabPartition, pad_vocab_size
from shared.padding_rules import padded_by_rule


@settings(deadline=None)  # times say nothing on a busy machine
@given(rows=st.integers(1, 1000), world_size=st.integers(1, 64), data=st.data())
def test_every_id_has_exactly_one_owner(rows, world_size, data):
    padding = data.draw(st.integers(0, rows * world_size - 1))
    partition = VocabPartition(rows * world_size - padding, world_size, rows * world_size)
    ids = np.array(data.draw(st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, rows * world_size + 1))), np.int64)
    before, valid = ids.copy(), (ids >= 0) & (ids < partition.vocab_size)
    np.testing.assert_array_equal(partition.is_valid(ids), valid)
    np.testing.assert_array_equal(partition.owner(ids), np.where(valid, ids // rows, -1))
    for rank in range(world_size):
        owned = partition.owns(ids, rank)
        np.testing.assert_array_equal(owned, valid & (ids // rows == rank))
        np.testing.assert_array_equal(owned, np.isin(ids, range(*partition.owned_range(rank))))
        local, found = partition.locate(ids, rank)
        np.testing.assert_array_equal(found, owned)
        np.testing.assert_array_equal(local[found] + partition.start(rank), ids[found])
        numbers = partition.local_ids(ids, rank)
        np.testing.assert_array_equal((numbers >= 0) & (numbers < rows), found)
        np.testing.assert_array_equal(numbers[found], local[found])
        start, stop = partition.owned_range(rank)
        assert partition.has_padding(rank) == (stop - start < rows)
        np.testing.assert_array_equal(partition.keys(ids, rank), np.where(found, local, rows))
        assert local.min(initial=0) >= 0
        assert local.max(initial=0) < rows
        np.testing.assert_array_equal(ids, before)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_no_integer_dtype_wraps(dtype):
    partition = VocabPartition(600, 3)
    ids = np.array([0, 5, 100, 127], dtype)
    np.testing.assert_array_equal(partition.local_ids(ids, 2), ids.astype(object) - 400)
    np.testing.assert_array_equal(partition.owner(ids), [0, 0, 0, 0])
    extremes = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    exact = [int(i) // 200 if 0 <= int(i) < 600 else -1 for i in extremes]
    np.testing.assert_array_equal(partition.owner(extremes), exact)
    for rank in range(3):
        np.testing.assert_array_equal(partition.owns(extremes, rank), np.array(exact) == rank)


def test_python_ints_work_too():
    partition = VocabPartition(12, 3)
    assert [partition.owner(i) for i in (-1, 0, 4, 11, 12, 2**70)] == [-1, 0, 1, 2, -1, -1]
    assert (partition.owns(4, 1), partition.owns(4, 0), partition.locate(6, 1)) == (True, False, (2, True))
    assert [partition.keys(i, 1) for i in (6, -1, 3, 8, 2**70)] == [2, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "padded", "owned"),
    [
        ((24, 3), 24, [(0, 8), (8, 16), (16, 24)]),
        ((12, 3, 12), 12, [(0, 4), (4, 8), (8, 12)]),
        ((12, 3, "even"), 12, [(0, 4), (4, 8), (8, 12)]),
        ((10, 4, "even"), 12, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        ((10, 4, 16), 16, [(0, 4), (4, 8), (8, 10), (10, 10)]),
        ((3, 8, "even"), 8, [(0, 1), (1, 2), (2, 3), *[(3, 3)] * 5]),
    ],
)
def test_ranges_are_half_open_and_padding_belongs_to_no_id(sizes, padded, owned):
    partition, (vocab_size, world_size, *_) = VocabPartition(*sizes), sizes
    rows = padded // world_size
    assert (partition.padded_vocab_size, partition.padding_rows) == (padded, padded - vocab_size)
    assert [partition.owned_range(r) for r in range(world_size)] == owned
    whole = [(partition.start(r), partition.stop(r)) for r in range(world_size)]
    assert whole == [(r * rows, (r + 1) * rows) for r in range(world_size)]


def test_it_is_frozen_and_compares_by_value():
    partition = VocabPartition(np.int64(10), np.int32(4), "even")
    for same in (VocabPartition(10, 4, 12), VocabPartition(10, 4, pad_vocab_size(10, 4))):
        assert (partition, hash(partition)) == (same, hash(same))
    assert VocabPartition(12, 3) == VocabPartition(12, 3, 12) == VocabPartition(12, 3, "even") != partition
    assert type(partition.vocab_size) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.vocab_size = 13


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), True, 1.0, np.array(["a"]), [1, 2]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match="integer dtype"):
        VocabPartition(12, 3).owner(ids)


@pytest.mark.parametrize("rank", [1.5, np.float64(1), "1", True, None, np.array(1.0), -1, 3])
def test_bad_ranks_are_refused(rank):
    says = r"rank must be (an integer|in \[0, world_size\))"
    for use in (VocabPartition(12, 3).start, lambda rank: VocabPartition(12, 3).locate(np.arange(3), rank)):
        with pytest.raises(ValueError if type(rank) is int else TypeError, match=says):
            use(rank)


@pytest.mark.parametrize(
    ("sizes", "error", "match"),
    [
        ((50257, 8), ValueError, "vocab_size=50257 over world_size=8 .* next size that divides is 50264"),
        ((3, 8), ValueError, "next size that divides is 8"),
        *((sizes, ValueError, "must be at least 1") for sizes in ((0, 1), (-8, 2), (8, 0), (8, -1))),
        *((sizes, TypeError, "must be an integer") for sizes in ((8.0, 1), ("8", 1), (True, 1), (8, None))),
        (
            (10, 4, 9),
            ValueError,
            "at least vocab_size=10 and divisible by world_size=4, got 9; the least .* size is 12",
        ),
        *(((10, 4, padded), ValueError, f"got {padded}") for padded in (13, 8, -12)),
        ((10, 4, "odd"), ValueError, "a number of rows or \"even\", got 'odd'"),
        *(((10, 4, padded), TypeError, "padded_vocab_size must be an integer") for padded in (12.0, True)),
    ],
)
def test_bad_sizes_are_refused(sizes, error, match):
    with pytest.raises(error, match=match):
        VocabPartition(*sizes)


@pytest.mark.parametrize(
    ("vocab_size", "world_size", "multiple_of", "padded"),
    [
        (50257, 8, 1, 50264),
        (50257, 8, 64, 50304),
        (50257, 8, 128 * 8, 51200),
        (50257, 7, 64, 50624),
        (8, 8, 1, 8),
        (3, 8, 1, 8),
    ],
)
def test_the_least_size_that_everything_divides(vocab_size, world_size, multiple_of, padded):
    assert pad_vocab_size(vocab_size, world_size, multiple_of) == padded
    for smaller in range(vocab_size, padded):
        assert smaller % world_size or smaller % multiple_of


def test_rules_of_padding():
    rules = {None: None, "16": 16, "even": 12, "multiple-of:6": 12, "5*w": 20}
    assert {rule: padded_by_rule(rule, 10, 4) for rule in rules} == rules
    for rule in ("odd", "", "-4", "1.5", "multiple-of:", "multiple-of:x", "*w", "w*128", "1e9"):
        with pytest.raises(ValueError, match="--padded-vocab-size must be a number of rows, even, multiple-of:M or M"):
            padded_by_rule(rule, 10, 4)
    with pytest.raises(ValueError, match="multiple_of must be at least 1"):
        padded_by_rule("multiple-of:0", 10, 4)
    for sizes in ((0, 1, 1), (8, 0, 1), (8, 1, 0), (8, 1, -64)):
        with pytest.raises(ValueError, match="must be at least 1"):
            pad_vocab_size(*sizes)
