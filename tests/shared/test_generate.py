"""What is generated for a comparison, pinned: two machines must generate the same."""

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


def test_a_table_has_special_rows_and_ordinary_ones():
    table = np.concatenate(list(table_chunks(6000, 10, DTYPES["bfloat16"], seed=0))).astype(np.float64)
    special = table[special_rows(6000)]
    np.testing.assert_array_equal(special[:, 0], [np.nan, np.inf, -np.inf, 0])
    assert np.signbit(special[3]).all()
    assert (special[1:] == special[1:, :1]).all()
    assert abs(np.delete(table, special_rows(6000), axis=0)).max() <= 1


def test_ids_visit_every_edge_and_some_outside():
    ids = zipf_ids((4, 2048), VocabPartition(9000, 3), seed=0)
    assert {0, 2999, 3000, 5999, 6000, 8999, -1, 9000, 2**32, 2**63 - 1, -(2**63)} <= set(ids.ravel().tolist())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("ids", [np.zeros(5000, int), np.arange(5000) % 7, np.zeros(0, int), np.array(3)])
def test_gradients_sum_exactly_in_any_order(name, ids, rng):
    gradient = exact_gradient(ids, 6, DTYPES[name], seed=1).reshape(-1, 6)
    wide = rng.permutation(gradient.astype(accumulation_dtype(DTYPES[name])))
    running = np.cumsum(wide, axis=0, dtype=wide.dtype)[-1:].sum(0)
    np.testing.assert_array_equal(running.astype(np.float64), gradient.astype(np.float64).sum(0))


def test_gradients_of_very_frequent_ids_have_fewer_steps():
    assert len(np.unique(exact_gradient(np.zeros(2**20, int), 1, DTYPES["float32"], 0))) <= 32
