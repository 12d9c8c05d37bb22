"""The NumPy oracle against plain indexing."""

import ml_dtypes
import numpy as np
import pytest

from shared import VocabPartition
from shared.proof.oracle import accumulation_dtype, partial_lookup, sum_partials, weight_grad


def partials(table, ids, world_size):
    partition = VocabPartition(len(table), world_size)
    n = partition.rows_per_rank
    return [partial_lookup(table[r * n : (r + 1) * n], ids, partition, r) for r in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_sum_is_plain_indexing(rng, world_size):
    table = rng.standard_normal((24, 5))
    ids = rng.integers(-3, 27, (4, 6))
    valid = (ids >= 0) & (ids < 24)
    expected = np.where(valid[..., None], table[ids.clip(0, 23)], 0)
    np.testing.assert_array_equal(sum_partials(partials(table, ids, world_size)), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 2, 3, 4)])
def test_any_shape_of_ids(rng, shape):
    ids = rng.integers(0, 24, shape)
    assert sum_partials(partials(np.ones((24, 5)), ids, 3)).shape == (*shape, 5)


def test_holes_are_plus_zero_and_rows_are_bits():
    table = np.array([[-0.0, np.nan], [np.inf, -np.inf]])
    own, other = partials(table, np.array([0, 1]), 2)
    assert np.signbit(own[0, 0])
    assert not np.signbit(own[1]).any()
    assert not np.isnan(other).any()
    assert (other[0] == 0).all()


def test_ids_are_not_modified():
    ids = np.array([5, -1, 99])
    before = ids.copy()
    partials(np.ones((6, 2)), ids, 2)
    np.testing.assert_array_equal(ids, before)


def test_gradients_of_16_bit_tables_are_summed_in_float32():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        grad = weight_grad(np.ones((5000, 2), dtype), np.zeros(5000, int), VocabPartition(4, 2), 0)
        assert grad.dtype == dtype
        np.testing.assert_array_equal(grad, np.array([[5000, 5000], [0, 0]]).astype(dtype))
    assert accumulation_dtype(np.float64) == np.float64


def test_gradient_against_a_loop(rng):
    ids, grad_output = rng.integers(-2, 26, (4, 6)), rng.integers(-8, 8, (4, 6, 3)).astype(np.float64)
    expected = np.zeros((24, 3))
    for position in np.ndindex(ids.shape):
        if 0 <= ids[position] < 24 and ids[position] != 7:
            expected[ids[position]] += grad_output[position]
    partition = VocabPartition(24, 3)
    whole = np.concatenate([weight_grad(grad_output, ids, partition, r, padding_idx=7) for r in range(3)])
    np.testing.assert_array_equal(whole, expected)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        sum_partials([])
