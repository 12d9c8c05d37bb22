"""Any table, any ids: both layers and the oracle agree in every bit."""

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.proof.generate import exact_gradient

ALL_BITS = {np.float32: np.uint32, np.float16: np.uint16, ml_dtypes.bfloat16: np.uint16}


@st.composite
def cases(draw):
    """Few sizes, so that little is compiled; tables of any bits whatever, ids in and around the vocabulary."""
    dtype = draw(st.sampled_from(list(ALL_BITS)))
    world_size = draw(st.sampled_from([1, 2, 3]))
    vocab_size = 6
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).integers(0, np.iinfo(ALL_BITS[dtype]).max, (vocab_size, 2), ALL_BITS[dtype])
    wild = st.sampled_from([-(2**63), 2**63 - 1, 2**32, 2**31, -1, vocab_size])
    ids = draw(st.lists(st.integers(0, vocab_size - 1) | wild, min_size=8, max_size=8))
    return bits.view(dtype), world_size, np.array(ids).reshape(2, 4), draw(st.none() | st.integers(0, vocab_size - 1))


def without_subnormals(table):
    """XLA flushes subnormal numbers to zero where it adds on a CPU: the sum of the partials has none."""
    table = table.copy()
    with np.errstate(invalid="ignore"):
        table[np.abs(table.astype(np.float64)) < float(ml_dtypes.finfo(table.dtype).smallest_normal)] = 0
    return table


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_everything_agrees(pair, case):
    table, world_size, ids, padding_idx = case
    gradient = exact_gradient(ids, 2, table.dtype, seed=0)
    pair(without_subnormals(table), world_size, padding_idx).assert_equal(ids, gradient)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_partials_agree_for_any_bits_whatever(pair, case):
    table, world_size, ids, _ = case
    both = pair(table, world_size)
    gradient = np.zeros((*ids.shape, 2), table.dtype)
    unsigned = ALL_BITS[table.dtype.type]
    results = [f(ids, gradient).partials.view(unsigned) for f in (both.oracle, both.torch, both.jax)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
