"""What is made up for a comparison, pinned: two machines must make up the same."""

import hashlib

import numpy as np
import pytest

from shared import VocabPartition
from shared.bits import DTYPES
from shared.proof.generate import exact_gradient, special_rows, table_chunks, zipf_ids
from shared.proof.oracle import accumulation_dtype


def test_golden_hashes():
    table = np.concatenate(list(table_chunks(9000, 24, DTYPES["float32"], seed=7)))
    ids = zipf_ids((3, 500), VocabPartition(9000, 3), seed=7)
    gradient = exact_gradient(ids, 24, DTYPES["float32"], seed=7)
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (table, ids, gradient)]
    assert digests == ["53c037686e6a9b7d", "6447a1b6099f9786", "56182b3e04164e6a"]


@pytest.mark.parametrize("name", DTYPES)
def test_a_table_has_special_rows_and_ordinary_ones(name):
    table = np.concatenate(list(table_chunks(6000, 10, DTYPES[name], seed=0))).astype(np.float64)
    nan, inf, minus_inf, minus_zero = table[special_rows(6000)]
    assert np.isnan(nan).all()
    assert (inf == np.inf).all()
    assert (minus_inf == -np.inf).all()
    assert np.signbit(minus_zero).all()
    assert not minus_zero.any()
    ordinary = np.delete(table, special_rows(6000), axis=0)
    assert abs(ordinary).max() <= 1
    assert abs(ordinary.mean()) < 0.02


def test_ids_follow_zipf_and_visit_every_edge():
    partition = VocabPartition(9000, 3)
    ids = zipf_ids((4, 2048), partition, seed=0)
    assert {0, 2999, 3000, 5999, 6000, 8999, -1, 9000, 2**32, 2**63 - 1, -(2**63)} <= set(ids.ravel().tolist())
    counts = [partition.owns(ids, rank).sum() for rank in range(3)]
    assert counts[0] > 3 * counts[1] > 3 * counts[2] > 0
    assert set(zipf_ids((4, 2048), VocabPartition(2, 1), seed=0).ravel().tolist()) > {0, 1}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("ids", [np.zeros(5000, int), np.arange(5000) % 7, np.zeros(0, int), np.array(3)])
def test_gradients_sum_exactly_in_any_order(name, ids, rng):
    gradient = exact_gradient(ids, 6, DTYPES[name], seed=1).reshape(-1, 6)
    wide = gradient.astype(accumulation_dtype(DTYPES[name]))
    exact = gradient.astype(np.float64).sum(0)
    for order in (np.arange(len(wide)), rng.permutation(len(wide))):
        running = np.cumsum(wide[order], axis=0, dtype=wide.dtype)[-1:] if len(wide) else np.zeros((1, 6))
        np.testing.assert_array_equal(running[0].astype(np.float64), exact)


def test_gradients_of_very_frequent_ids_have_fewer_steps():
    assert len(np.unique(exact_gradient(np.zeros(2**20, int), 1, DTYPES["float32"], 0))) <= 32
