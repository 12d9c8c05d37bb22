"""Gradients, against JAX's own on the whole table and against the NumPy oracle.

Where the terms are integers small enough, sums are exact in any order and bits are compared. Elsewhere two sums of k
terms differ by rounding, at most k * eps / 2 of a partial sum each, hence rtol = k * eps with k = 60 tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition
from shared.proof.oracle import weight_grad

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
MESHES = [((1,), ("tp",)), ((2,), ("tp",)), ((3,), ("tp",)), ((8,), ("tp",)), ((2, 2, 2), ("dp", "tp", "sp"))]


@pytest.fixture(params=["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def kind(request):
    return request.param


def gradient(emb, ids, grad_output):
    """The gradient of the table, when every rank's partial gets ``grad_output``."""

    @jax.jit
    def pull_back(emb, ids, grad_output):
        partials, back = jax.vjp(lambda emb: emb(ids), emb)
        stacked = jnp.broadcast_to(grad_output, partials.shape, out_sharding=jax.typeof(partials).sharding)
        return back(stacked)[0].weight

    return pull_back(emb, ids, grad_output)


def oracle(ids, grad_output, vocab_size, padding_idx=None):
    return weight_grad(np.asarray(grad_output), ids, VocabPartition(vocab_size, 1), 0, padding_idx)


@pytest.mark.parametrize(
    ("dtype", "padding_idx"),
    [(jnp.float32, None), (jnp.float32, 0), (jnp.float32, 17), (jnp.bfloat16, 17), (jnp.float16, None)],
)
@pytest.mark.parametrize(("shape", "names"), MESHES)
def test_exact_sums_are_the_oracles(mesh_of, rng, dtype, shape, names, padding_idx):
    emb = ParallelVocabEmbedding(48, 6, mesh_of(shape, names), dtype=dtype, padding_idx=padding_idx)
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, 48, 500), np.full(300, 17)])
    grad_output = jnp.asarray(rng.integers(-7, 8, (len(ids), 6)), dtype)
    found = gradient(emb, ids, grad_output)
    assert found.dtype == dtype
    assert found.sharding.is_equivalent_to(emb.weight.sharding, 2)
    np.testing.assert_array_equal(found, oracle(ids, grad_output, 48, padding_idx))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sums_are_close_to_jaxs_own(mesh_of, rng, dtype):
    emb = ParallelVocabEmbedding(12, 6, mesh_of((3,)), dtype=dtype)
    ids, grad_output = rng.integers(0, 12, 60), jnp.asarray(rng.standard_normal((60, 6)), dtype)
    table = jnp.asarray(np.asarray(emb.weight), jnp.float32)
    (expected,) = jax.vjp(lambda table: jnp.take(table, ids, axis=0), table)[1](grad_output.astype(jnp.float32))
    rounding = 60 * float(jnp.finfo(jnp.float32).eps) + (float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 0)
    found = np.asarray(gradient(emb, ids, grad_output)).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (2, 4)])
def test_5000_equal_ids_do_not_saturate_over_data_ranks_either(mesh_of, dtype, shape):
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = ParallelVocabEmbedding(8, 4, mesh, dtype=dtype)
    ids = jax.device_put(np.full(5000, 6, np.int32), NamedSharding(mesh, P("dp")))
    grad = jax.jit(jax.grad(lambda emb: emb(ids).astype(jnp.float32).sum()))(emb).weight
    expected = np.zeros((8, 4), dtype)
    expected[6] = 5000
    np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_sums_round_once_over_data_ranks(mesh_of, shape):
    """259 + 2 ones are 261, in bfloat16 260; were each data rank to round its own sum first, it would be 260 + 2."""
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = ParallelVocabEmbedding(6, 4, mesh, dtype=jnp.bfloat16)
    ids = jax.device_put(np.array([1] * 259 + [5] * 2 + [1] * 2 + [5] * 259), NamedSharding(mesh, P("dp")))
    grad = jax.jit(jax.grad(lambda emb: emb(ids).astype(jnp.float32).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[[1, 5], 0], np.array([260, 260], jnp.bfloat16))


def test_not_a_number_reaches_only_the_row_that_was_asked_for(mesh_of):
    emb = ParallelVocabEmbedding(12, 3, mesh_of((3,)))
    grad_output = np.ones((6, 3), np.float32)
    grad_output[1], grad_output[4] = np.nan, np.inf
    grad = np.asarray(gradient(emb, np.array([0, 4, 5, 4, -1, 12]), grad_output))
    assert np.isnan(grad[4]).all()
    assert (grad[[0, 5]] == 1).all()
    assert not np.delete(grad, [0, 4, 5], axis=0).any()


@pytest.mark.parametrize("padding_idx", [None, 5])
def test_forward_mode_and_second_order(mesh_of, rng, padding_idx):
    emb = ParallelVocabEmbedding(12, 2, mesh_of((3,)), padding_idx=padding_idx)
    ids = np.array([[0, 5, 4], [11, 5, -1]])
    _, tangent = jax.jvp(lambda emb: emb(ids), (emb,), (jax.tree.map(jnp.ones_like, emb),))
    counted = np.stack([emb.partition.owns(ids, r) & (ids != padding_idx) for r in range(3)])
    np.testing.assert_array_equal(tangent, np.repeat(counted[..., None], 2, axis=-1))

    def loss(emb):
        return (emb(ids) ** 3).sum()

    direction = emb.with_weight(rng.standard_normal((12, 2)).astype(np.float32))
    forward_over_reverse = jax.jit(lambda emb, d: jax.jvp(jax.grad(loss), (emb,), (d,))[1])(emb, direction)
    counts = np.zeros((12, 1))
    for i in ids[(ids >= 0) & (ids != padding_idx)]:
        counts[i] += 1
    expected = counts * 6 * np.asarray(emb.weight) * np.asarray(direction.weight)
    np.testing.assert_allclose(forward_over_reverse.weight, expected, rtol=4 * np.finfo(np.float32).eps)


def test_training_follows_the_unsharded_embedding(mesh_of, rng):
    """The 120 terms of the loss may be added in another order, and the steps carry that on: tolerances of that size."""
    emb = ParallelVocabEmbedding(12, 4, mesh_of((3,)))
    table = jnp.asarray(np.asarray(emb.weight))

    @jax.jit
    def step(emb, ids):
        loss, grad = jax.value_and_grad(lambda emb: ((emb(ids).sum(0) - 1) ** 2).sum())(emb)
        return loss, jax.tree.map(lambda p, g: p - 0.125 * g, emb, grad)

    @jax.jit
    def unsharded_step(table, ids):
        loss, grad = jax.value_and_grad(lambda table: ((jnp.take(table, ids, axis=0) - 1) ** 2).sum())(table)
        return loss, table - 0.125 * grad

    for _ in range(10):
        ids = rng.integers(0, 12, 30).astype(np.int32)
        loss, emb = step(emb, ids)
        expected, table = unsharded_step(table, ids)
        np.testing.assert_allclose(loss, expected, rtol=120 * np.finfo(np.float32).eps)
        np.testing.assert_allclose(emb.weight, table, rtol=1e-5)
