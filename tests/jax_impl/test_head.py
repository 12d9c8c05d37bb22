"""Logits, cross entropy and decoding over a split vocabulary, against the float64 oracle."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_impl import linear_cross_entropy, parallel_argmax, parallel_cross_entropy, parallel_logits, parallel_top_k
from shared import VocabPartition
from shared.head import LossOptions
from shared.proof import head_oracle

V, E, TOKENS = 21, 8, (3, 8)  # padded to 24: of 4 ranks the last has 3 ids, of 8 the last has none
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.02, "ignore_index": 4, "invalid_targets": "ignore"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5},
]
# Sums of a few tens of products: some units in the last place of the dtype that hidden states and table have.
TOLERANCE = {np.float32: 2e-5, ml_dtypes.bfloat16: 2e-2}


def case(dtype, world_size):
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, 24)
    hidden = rng.standard_normal((*TOKENS, E)).astype(dtype)
    weight = rng.standard_normal((24, E)).astype(dtype)
    weight[V:] = np.nan  # padding rows take no part, whatever they hold
    targets = rng.integers(0, V, TOKENS).astype(np.int32)
    targets[0, :3], targets[2, 5], targets[1, :2] = -100, 4, (0, V - 1)
    return hidden, weight, targets, partition


def mapped(function, world_size, in_specs, out_specs):
    mesh = jax.make_mesh((world_size,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:world_size])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def upstream_of(reduction):
    return np.random.default_rng(1).standard_normal(TOKENS) if reduction == "none" else np.array(0.7)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("world_size", "seq_dim"), [(1, None), (4, None), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_loss_and_gradients(options, world_size, seq_dim, dtype):
    hidden, weight, targets, partition = case(dtype, world_size)
    known = LossOptions(**options)
    upstream = upstream_of(known.reduction)
    expected = head_oracle.loss(hidden, weight, targets, V, known, upstream)

    def step(hidden, weight, upstream):
        def loss(hidden, weight):
            return linear_cross_entropy(hidden, weight, targets, partition, "tp", seq_dim=seq_dim, **options)

        found, pull_back = jax.vjp(loss, hidden, weight)
        return found, *pull_back(upstream.astype(found.dtype))

    split = P() if seq_dim is None else P(None, "tp")
    run = mapped(step, world_size, (split, P("tp"), P()), (P(), split, P("tp")))
    loss, hidden_grad, weight_grad = map(np.asarray, run(hidden, weight, jnp.asarray(upstream)))
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(loss, expected.loss, **close)
    np.testing.assert_allclose(hidden_grad.astype(np.float64), expected.hidden_grad, **close)
    np.testing.assert_allclose(weight_grad[:V].astype(np.float64), expected.weight_grad[:V], **close)
    assert not weight_grad[V:].any()


@pytest.mark.parametrize("options", [each for each in OPTIONS if "softcap" not in each], ids=str)
def test_loss_of_logits_that_are_there(options):
    hidden, weight, targets, partition = case(np.float32, 4)
    known = LossOptions(**options)
    upstream = upstream_of(known.reduction)
    expected = head_oracle.loss(hidden, weight, targets, V, known, upstream)

    def step(hidden, weight, upstream):
        def loss(hidden, weight):
            logits = parallel_logits(hidden, weight, partition, "tp")
            return parallel_cross_entropy(logits, targets, partition, "tp", **options)

        found, pull_back = jax.vjp(loss, hidden, weight)
        return found, *pull_back(upstream.astype(found.dtype))

    run = mapped(step, 4, (P(), P("tp"), P()), (P(), P(), P("tp")))
    loss, hidden_grad, weight_grad = map(np.asarray, run(hidden, weight, jnp.asarray(upstream)))
    np.testing.assert_allclose(loss, expected.loss, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(hidden_grad, expected.hidden_grad, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(weight_grad[:V], expected.weight_grad[:V], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_decoding(world_size):
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, 24)
    logits = rng.integers(-2, 3, (6, 24)).astype(np.float32)  # many ties
    logits[0, 5], logits[1, 2], logits[2] = np.nan, np.inf, -np.inf
    values, ids = head_oracle.top_k(logits[:, :V], 7, V)

    def decode(logits):
        return parallel_argmax(logits, partition, "tp"), *parallel_top_k(logits, 7, partition, "tp")

    found = mapped(decode, world_size, P(None, "tp"), P())(logits)
    np.testing.assert_array_equal(found[0], head_oracle.argmax(logits[:, :V], V))
    np.testing.assert_array_equal(found[1], values.astype(np.float32))
    np.testing.assert_array_equal(found[2], ids)


def test_gathered_logits_are_refused():
    with pytest.raises(ValueError, match="24"):
        mapped(lambda logits: parallel_argmax(logits, VocabPartition(V, 4, 24), "tp"), 4, P(), P())(jnp.zeros((2, 24)))
