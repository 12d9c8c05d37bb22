"""Bits, distances and hashes."""

import ml_dtypes
import numpy as np
import pytest

from shared.bits import DTYPES, canonical_nan, dtype_named, row_hashes, ulp_distance, unsigned_view


@pytest.mark.parametrize("name", DTYPES)
def test_neighbours_are_one_apart_and_extremes_do_not_overflow(name):
    dtype = DTYPES[name]
    values = np.array([0.0, 1.0, -1.0, 1e-3, ml_dtypes.finfo(dtype).max], dtype)
    up = (unsigned_view(values) - np.array([0, 1, 1, 1, 1], unsigned_view(values).dtype)).view(dtype)
    np.testing.assert_array_equal(ulp_distance(values, up), [0, 1, 1, 1, 1])
    smallest = np.array([1], unsigned_view(values).dtype).view(dtype)
    np.testing.assert_array_equal(ulp_distance(smallest, -smallest), [2])
    np.testing.assert_array_equal(ulp_distance(values, np.full_like(values, np.nan)), np.full(5, np.nan))
    infinity = np.array([np.inf], dtype)
    assert ulp_distance(infinity, -infinity) == 2.0 * int(unsigned_view(infinity)[0])


def test_canonical_nan_changes_only_nan():
    values = np.array([0x7FC00001, 0xFFC00000, 0x3F800000, 0x80000000], np.uint32).view(np.float32)
    canonical = unsigned_view(canonical_nan(values))
    assert canonical[0] == canonical[1]
    np.testing.assert_array_equal(canonical[2:], unsigned_view(values)[2:])


@pytest.mark.parametrize("emb_size", [1, 4, 13])
def test_rows_are_told_apart_by_any_bit(rng, emb_size):
    rows = rng.standard_normal((50, emb_size)).astype(np.float16)
    changed = rows.copy()
    for row in range(50):
        unsigned_view(changed)[row, row % emb_size] ^= 1 << (row % 16)
    assert len(set(row_hashes(np.concatenate([rows, changed])).tolist())) == 100
    assert row_hashes(np.zeros((1, emb_size))) == 0


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got 'int8'"):
        dtype_named("int8")
