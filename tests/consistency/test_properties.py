"""Any table, any ids: both layers and the oracle agree in every bit."""

import ml_dtypes
import numpy as np
import pytest
from contract.backends import Jax, Oracle, Torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slower
from meshes import assert_same_bits

from shared.bits import canonical_nan
from shared.proof.generate import exact_gradient

VOCAB = 6
WILD = [-(2**63), 2**63 - 1, 2**32, 2**31, -1, VOCAB]
ids_of_8 = st.lists(st.integers(0, VOCAB - 1) | st.sampled_from(WILD), min_size=8, max_size=8)


def assert_agree(table, world_size, padding_idx, ids):
    """Partials in every bit; gradients, which are sums, up to the payload of a NaN."""
    layers = [backend(table, world_size, padding_idx=padding_idx) for backend in (Oracle, Torch, Jax)]
    upstream = exact_gradient(ids, table.shape[1], table.dtype, seed=0)
    expected, *partials = (np.stack(layer.lookup(ids)) for layer in layers)
    gradient, *gradients = (canonical_nan(np.concatenate(layer.gradients(ids, upstream))) for layer in layers)
    for found in partials:
        assert_same_bits(found, expected)
    for found in gradients:
        assert_same_bits(found, gradient)


@pytest.mark.parametrize(
    ("dtype", "world_size"), [(ml_dtypes.bfloat16, 3), slower(np.float32, 2), slower(np.float16, 1)]
)
@settings(max_examples=40, deadline=None)
@given(bits=st.integers(0, 2**32 - 1), ids=ids_of_8, padding_idx=st.sampled_from([None, 4]))
def test_everything_agrees(dtype, world_size, bits, ids, padding_idx):
    """Tables of any bits; few sizes, so that little is compiled."""
    raw = np.random.default_rng(bits).integers(0, 256, (VOCAB, 2 * np.dtype(dtype).itemsize), np.uint8)
    assert_agree(raw.view(dtype), world_size, padding_idx, np.array(ids).reshape(2, 4))
