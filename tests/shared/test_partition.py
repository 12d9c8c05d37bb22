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
    owned = np.array([partition.owns(ids, rank) for rank in range(world_size)]).reshape(world_size, -1)
    np.testing.assert_array_equal(owned.sum(0), (ids >= 0) & (ids < partition.vocab_size))
    np.testing.assert_array_equal(np.where(owned.any(0), owned.argmax(0), -1), partition.owner(ids))
    for rank in range(world_size):
        np.testing.assert_array_equal(owned[rank], (ids >= 0) & (ids < partition.vocab_size) & (ids // rows == rank))
        np.testing.assert_array_equal(owned[rank], np.isin(ids, range(*partition.owned_range(rank))))
        before = ids.copy()
        local, found = partition.locate(ids, rank)
        np.testing.assert_array_equal(found, owned[rank])
        np.testing.assert_array_equal(local[found] + partition.start(rank), ids[found])
        numbers = partition.local_ids(ids, rank)
        np.testing.assert_array_equal((numbers >= 0) & (numbers < partition.rows_per_rank), found)
        np.testing.assert_array_equal(numbers[found], local[found])
        start, stop = partition.owned_range(rank)
        assert partition.has_padding(rank) == (stop - start < partition.rows_per_rank)
        np.testing.assert_array_equal(partition.keys(ids, rank), np.where(found, local, partition.rows_per_rank))
        assert local.min(initial=0) >= 0
        assert local.max(initial=0) < partition.rows_per_rank
        np.testing.assert_array_equal(ids, before)


def test_ranges_are_half_open_and_meet():
    partition = VocabPartition(24, 3)
    assert [(partition.start(r), partition.stop(r)) for r in range(3)] == [(0, 8), (8, 16), (16, 24)]


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
    assert partition.owns(4, 1)
    assert not partition.owns(4, 0)
    assert partition.keys(6, 1) == 2
    assert [partition.keys(i, 1) for i in (-1, 3, 8, 2**70)] == [4] * 4
    assert partition.locate(6, 1) == (2, True)


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), True, 1.0, np.array(["a"]), [1, 2]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match="integer dtype"):
        VocabPartition(12, 3).owner(ids)


def test_an_uneven_split_names_sizes_and_the_next_that_divides():
    with pytest.raises(ValueError, match=r"vocab_size=50257 over world_size=8 .* next size that divides is 50264"):
        VocabPartition(50257, 8)
    with pytest.raises(ValueError, match="next size that divides is 8"):
        VocabPartition(3, 8)


@pytest.mark.parametrize("sizes", [(0, 1), (-8, 2), (8, 0), (8, -1)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        VocabPartition(*sizes)


@pytest.mark.parametrize("sizes", [(8.0, 1), ("8", 1), (True, 1), (8, None)])
def test_sizes_that_are_no_integers_are_refused(sizes):
    with pytest.raises(TypeError, match="must be an integer"):
        VocabPartition(*sizes)


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\)"):
        VocabPartition(12, 3).start(rank)


@pytest.mark.parametrize("rank", [1.5, np.float64(1), "1", True, None, np.array(1.0)])
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(TypeError, match="rank must be an integer"):
        VocabPartition(12, 3).locate(np.arange(3), rank)


def test_it_is_frozen_and_compares_by_value():
    partition = VocabPartition(np.int64(12), np.int32(3))
    assert partition == VocabPartition(12, 3)
    assert hash(partition) == hash(VocabPartition(12, 3))
    assert type(partition.vocab_size) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.vocab_size = 13


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


@pytest.mark.parametrize("sizes", [(0, 1, 1), (8, 0, 1), (8, 1, 0), (8, 1, -64)])
def test_sizes_to_pad_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        pad_vocab_size(*sizes)


def test_padding_belongs_to_no_id():
    partition = VocabPartition(10, 4, "even")
    assert partition == VocabPartition(10, 4, 12) == VocabPartition(10, 4, pad_vocab_size(10, 4))
    assert hash(partition) == hash(VocabPartition(10, 4, 12))
    assert (partition.padded_vocab_size, partition.rows_per_rank, partition.padding_rows) == (12, 3, 2)
    assert [(partition.start(r), partition.stop(r)) for r in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [partition.owned_range(r) for r in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    ids = np.arange(-3, 16)
    np.testing.assert_array_equal(partition.is_valid(ids), (ids >= 0) & (ids < 10))
    np.testing.assert_array_equal(partition.owner(ids), np.where((ids >= 0) & (ids < 10), ids // 3, -1))
    for rank in range(4):
        np.testing.assert_array_equal(partition.owns(ids, rank), partition.owner(ids) == rank)


def test_without_padding_the_padded_size_is_the_size():
    partition = VocabPartition(12, 3)
    assert (partition.padded_vocab_size, partition.padding_rows) == (12, 0)
    assert partition == VocabPartition(12, 3, 12) == VocabPartition(12, 3, "even")


def test_more_ranks_than_rows():
    partition = VocabPartition(3, 8, "even")
    assert [partition.owned_range(r) for r in range(8)] == [(0, 1), (1, 2), (2, 3)] + [(3, 3)] * 5
    assert not partition.owns(np.arange(-1, 9), 5).any()


@pytest.mark.parametrize(
    ("padded", "error", "match"),
    [
        (9, ValueError, "at least vocab_size=10 and divisible by world_size=4, got 9; the least such size is 12"),
        (13, ValueError, "got 13"),
        (8, ValueError, "got 8"),
        (-12, ValueError, "got -12"),
        ("odd", ValueError, "a number of rows or \"even\", got 'odd'"),
        (12.0, TypeError, "padded_vocab_size must be an integer"),
        (True, TypeError, "padded_vocab_size must be an integer"),
    ],
)
def test_padded_sizes_that_will_not_do_are_refused(padded, error, match):
    with pytest.raises(error, match=match):
        VocabPartition(10, 4, padded)


def test_rules_of_padding():
    assert padded_by_rule(None, 10, 4) is None
    assert padded_by_rule("16", 10, 4) == 16
    assert padded_by_rule("even", 10, 4) == 12
    assert padded_by_rule("multiple-of:6", 10, 4) == 12
    assert padded_by_rule("5*w", 10, 4) == 20
    for rule in ("odd", "", "-4", "1.5", "multiple-of:", "multiple-of:x", "*w", "w*128", "1e9"):
        with pytest.raises(ValueError, match="--padded-vocab-size must be a number of rows, even, multiple-of:M or M"):
            padded_by_rule(rule, 10, 4)
    with pytest.raises(ValueError, match="multiple_of must be at least 1"):
        padded_by_rule("multiple-of:0", 10, 4)
