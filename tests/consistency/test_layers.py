"""Identical weights and ids through both layers: partials, sums and gradients are equal bit for bit.

The gradients fed in have exact sums in any order (`shared.proof.generate`), so bits can be asked for.
"""

import ml_dtypes
import numpy as np
import pytest

from shared.proof.generate import exact_gradient

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
WORLDS = [1, 2, 3, 8]


def table_of(rng, dtype, vocab_size=48, emb_size=6):
    return rng.standard_normal((vocab_size, emb_size)).astype(dtype)


def check(pair, table, world_size, ids, padding_idx=None):
    ids = np.asarray(ids, np.int64)
    gradient = exact_gradient(ids, table.shape[1], table.dtype, seed=0)
    pair(table, world_size, padding_idx).assert_equal(ids, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_random_ids_with_duplicates(pair, rng, dtype, world_size):
    check(pair, table_of(rng, dtype), world_size, rng.integers(0, 48, (4, 50)))


@pytest.mark.parametrize("world_size", WORLDS)
def test_float64_where_jax_has_it(pair, rng, x64, world_size):
    check(pair, table_of(rng, np.float64), world_size, rng.integers(-3, 51, (4, 50)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_edges_of_every_rank(pair, rng, dtype, world_size):
    n = 48 // world_size
    check(pair, table_of(rng, dtype), world_size, [[r * n, r * n + n - 1] for r in range(world_size)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_invalid_ids(pair, rng, dtype, world_size):
    outside = [-1, 48, 49, -48, 2**31 - 1, 2**31 + 5, 2**32, 2**32 + 5, 2**63 - 1, -(2**63)]
    check(pair, table_of(rng, dtype), world_size, [*outside, 0, 47])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("ids", [5, [], [[]], [7] * 5000, [[0]]], ids=["0-d", "empty", "empty-2d", "5000-equal", "one"])
def test_unusual_batches(pair, rng, dtype, world_size, ids):
    check(pair, table_of(rng, dtype), world_size, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [0, 20, 47])
def test_padding_idx(pair, rng, dtype, padding_idx):
    check(pair, table_of(rng, dtype), 3, rng.integers(0, 48, (4, 50)), padding_idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS)
def test_special_values(pair, rng, dtype, world_size):
    table = table_of(rng, dtype)
    table[[3, 13, 23, 43]] = np.array([[np.nan], [np.inf], [-np.inf], [-0.0]]).astype(dtype)
    check(pair, table, world_size, [*range(48), 3, 13, 23, 43])


@pytest.mark.parametrize("emb_size", [1, 3, 17, 256])
def test_any_number_of_columns(pair, rng, emb_size):
    check(pair, table_of(rng, np.float32, 24, emb_size), 3, rng.integers(-2, 26, 100))


def test_a_rank_may_own_a_single_row(pair, rng):
    check(pair, table_of(rng, np.float32, 8), 8, rng.integers(-1, 9, 100))


def test_a_wrong_table_is_noticed(pair, rng):
    both = pair(table_of(rng, np.float32), 3)
    ids = rng.integers(0, 48, 50)
    both.table = both.table.copy()
    both.table[ids[7], 2] = np.nextafter(both.table[ids[7], 2], np.float32(9))
    with pytest.raises(AssertionError, match="partials"):
        both.assert_equal(ids, exact_gradient(ids, 6, np.dtype(np.float32), 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_gradients_are_equal_up_to_the_order_of_sums(pair, rng, dtype):
    """Of 20 terms, summed in float32: at most 20 * eps apart, and for 16-bit tables one rounding more."""
    both = pair(table_of(rng, dtype, 10), 2)
    ids, gradient = rng.integers(0, 10, 20), rng.standard_normal((20, 6)).astype(dtype)
    one, other = (f(ids, gradient).gradient.astype(np.float64) for f in (both.torch, both.jax))
    rounding = 20 * 2.0**-23 + (0 if dtype is np.float32 else float(ml_dtypes.finfo(dtype).eps))
    np.testing.assert_allclose(one, other, rtol=rounding, atol=rounding)
