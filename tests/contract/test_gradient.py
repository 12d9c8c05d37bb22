"""The gradient of a row: the sum over its occurrences, in float32 for 16-bit tables, rounded once.

Where the terms are integers small enough, sums are exact in any order and bits are compared. Elsewhere two sums differ by
rounding: each of k additions errs by at most eps / 2 of a partial sum, hence rtol = k * eps with k = 60 tokens.
"""

import ml_dtypes
import numpy as np
import pytest
from contract.backends import DTYPES

from shared.partition import VocabPartition
from shared.proof.oracle import accumulation_dtype, weight_grad

V, E = 48, 6


def gradients(backend, ids, upstream, world_size=3, shape=(V, E), **options):
    return backend(np.ones(shape, upstream.dtype), world_size, **options).gradients(ids, upstream)


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "world_size", "padding_idx", "padded"),
    [
        ("float16", V, 2, 0, None),
        ("bfloat16", V, 8, 17, None),
        ("float32", V, 3, None, None),
        ("float64", V, 1, 17, None),
        ("float32", 10, 4, None, 24),
    ],
)
def test_exact_sums(backend, dtype, vocab_size, world_size, padding_idx, padded, rng):
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, V, 500), np.full(300, 17)])
    upstream = rng.integers(-7, 8, (len(ids), E)).astype(DTYPES[dtype])
    options = {"padding_idx": padding_idx, "padded_vocab_size": padded}
    partition = VocabPartition(vocab_size, world_size, padded)
    for rank, grad in enumerate(gradients(backend, ids, upstream, world_size, (vocab_size, E), **options)):
        np.testing.assert_array_equal(grad, weight_grad(upstream, ids, partition, rank, padding_idx))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_sums_are_close_to_those_in_float64(backend, dtype, rng):
    ids, upstream = rng.integers(0, 12, 60), rng.standard_normal((60, E)).astype(DTYPES[dtype])
    found = np.concatenate(gradients(backend, ids, upstream, shape=(12, E)))
    exact = np.zeros((12, E))
    np.add.at(exact, ids, upstream.astype(np.float64))
    wide = accumulation_dtype(upstream.dtype)
    rounding = 60 * np.finfo(wide).eps + (float(ml_dtypes.finfo(upstream.dtype).eps) if wide != upstream.dtype else 0)
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 5000), ("float16", 5000), ("float16", 2)])
def test_equal_ids_do_not_saturate(backend, dtype, count):
    upstream = np.ones((count + 2, 4), DTYPES[dtype])
    upstream[1] = 256
    ids = np.array([0, *[5] * count, 9])
    grad = gradients(backend, ids, upstream, 2, (8, 4))[1]
    np.testing.assert_array_equal(grad[1], np.full(4, 255 + count).astype(DTYPES[dtype]))
    assert not grad[[0, 2, 3]].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ties_round_to_even(backend, dtype):
    halfway = 2 / float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    for base in (halfway, halfway + 2):
        terms = np.repeat(np.array([[base], [1.0]]), 8, axis=1).astype(DTYPES[dtype])
        expected = terms.astype(np.float32).sum(0).astype(DTYPES[dtype])
        np.testing.assert_array_equal(gradients(backend, np.zeros(2, int), terms, 1, (2, 8))[0][0], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_reaches_only_the_row_asked_for(backend, dtype):
    ids, upstream = np.array([0, 4, 5, 4, -1, 12]), np.ones((6, 3), DTYPES[dtype])
    upstream[1], upstream[4] = np.nan, np.inf
    grads = np.concatenate(gradients(backend, ids, upstream, shape=(12, 3)))
    assert np.isnan(grads[4]).all()
    assert (grads[[0, 5]] == 1).all()
    assert not grads[[i for i in range(12) if i not in (0, 4, 5)]].any()
