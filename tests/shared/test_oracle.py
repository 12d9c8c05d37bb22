"""The NumPy oracle's gradient against a loop. That its lookup follows the contract is shown in ``contract``."""

import ml_dtypes
import numpy as np
import pytest

from shared import VocabPartition
from shared.proof.oracle import weight_grad


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_gradients_of_16_bit_tables_are_summed_in_float32(dtype):
    grad = weight_grad(np.ones((5000, 2), dtype), np.zeros(5000, int), VocabPartition(4, 2), 0)
    assert grad.dtype == dtype
    np.testing.assert_array_equal(grad, np.array([[5000, 5000], [0, 0]]).astype(dtype))


def test_gradient_against_a_loop(rng):
    ids, grad_output = rng.integers(-2, 26, (4, 6)), rng.integers(-8, 8, (4, 6, 3)).astype(np.float64)
    expected = np.zeros((24, 3))
    for position in np.ndindex(ids.shape):
        if 0 <= ids[position] < 24 and ids[position] != 7:
            expected[ids[position]] += grad_output[position]
    partition = VocabPartition(24, 3)
    whole = np.concatenate([weight_grad(grad_output, ids, partition, r, padding_idx=7) for r in range(3)])
    np.testing.assert_array_equal(whole, expected)
