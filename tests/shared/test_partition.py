"""Who owns what."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import VocabPartition


@given(rows=st.integers(1, 1000), world_size=st.integers(1, 64), data=st.data())
def test_every_id_has_exactly_one_owner(rows, world_size, data):
    partition = VocabPartition(rows * world_size, world_size)
    ids = np.array(data.draw(st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, rows * world_size + 1))), np.int64)
    owned = np.array([partition.owns(ids, rank) for rank in range(world_size)]).reshape(world_size, -1)
    np.testing.assert_array_equal(owned.sum(0), (ids >= 0) & (ids < partition.vocab_size))
    np.testing.assert_array_equal(np.where(owned.any(0), owned.argmax(0), -1), partition.owner(ids))
    for rank in range(world_size):
        local = partition.local_ids(ids, rank)
        np.testing.assert_array_equal((local >= 0) & (local < partition.rows_per_rank), owned[rank])
        np.testing.assert_array_equal(local[owned[rank]] + partition.start(rank), ids[owned[rank]])


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
    assert partition.local_ids(6, 1) == 2


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


def test_it_is_frozen_and_compares_by_value():
    partition = VocabPartition(np.int64(12), np.int32(3))
    assert partition == VocabPartition(12, 3)
    assert hash(partition) == hash(VocabPartition(12, 3))
    assert type(partition.vocab_size) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.vocab_size = 13
