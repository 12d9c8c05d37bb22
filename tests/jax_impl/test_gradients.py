"""Gradients under jit and JAX's transforms, in several reductions and on meshes of several axes.

Terms are integers small enough that sums are exact in any order: bits are compared with the oracle's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slower
from meshes import on

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition
from shared.proof.oracle import weight_grad

VOCAB, EMB = 2048, 6
# Repeated ids, neighbours at the ranks' borders, and ids that nobody has.
IDS = np.concatenate([[-1, 0, 0, 1, 511, 512, 513, 2047, 2048, 2**31 - 1], np.full(22, 700), np.arange(1020, 1028)])


def layer(mesh, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, mesh, **options)


def oracle(ids, upstream, padding_idx=None, vocab_size=VOCAB):
    return weight_grad(np.asarray(upstream), ids, VocabPartition(vocab_size, 1), 0, padding_idx)


def integers(rng, dtype, shape=(40, EMB)):
    return jnp.asarray(rng.integers(-7, 8, shape), dtype)


def loss(emb, ids, upstream):
    """Linear in the table, with ``upstream`` for the embedding's gradient."""
    output = emb(ids)
    if emb.reduction == "none":
        output = output.sum(axis=0, dtype=jnp.float32)
    return (output.astype(jnp.float32) * upstream.astype(jnp.float32)).sum()


@jax.jit
def pull_back(emb, ids, upstream):
    """The gradient where the embedding's, every rank's partial's, is ``upstream``."""
    output, back = jax.vjp(lambda emb: emb(ids), emb)
    return back(jnp.broadcast_to(upstream, output.shape, out_sharding=jax.typeof(output).sharding))[0].weight


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("shape", "names", "dtype", "padding_idx"),
    [
        ((2, 2, 2), ("dp", "tp", "sp"), jnp.bfloat16, 17),
        slower((2, 2, 2), ("dp", "tp", "sp"), jnp.float16, None),
        slower((1,), ("tp",), jnp.float32, 0),
        slower((3,), ("tp",), jnp.float32, None),
        slower((8,), ("tp",), jnp.float16, 17),
    ],
)
def test_partials_gradients_are_the_oracles(mesh_of, rng, dtype, shape, names, padding_idx):
    emb = ParallelVocabEmbedding(48, 6, mesh_of(shape, names), dtype=dtype, padding_idx=padding_idx)
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, 48, 500), np.full(300, 17)])
    upstream = integers(rng, dtype, (len(ids), 6))
    found = pull_back(emb, ids, upstream)
    assert found.dtype == dtype
    assert found.sharding.is_equivalent_to(emb.weight.sharding, 2)
    np.testing.assert_array_equal(found, oracle(ids, upstream, padding_idx, 48))


@pytest.mark.parametrize(
    ("reduction", "exchange", "dtype", "padding_idx"),
    [
        ("all_reduce", "dense", jnp.bfloat16, 700),
        ("reduce_scatter", "routed", jnp.float16, None),
        slower("none", "auto", jnp.float16, None),
        slower("none", "auto", jnp.bfloat16, 700),
        slower("all_reduce", "dense", jnp.float16, None),
        slower("reduce_scatter", "dense", jnp.float16, None),
        slower("reduce_scatter", "dense", jnp.bfloat16, 700),
        slower("reduce_scatter", "routed", jnp.bfloat16, 700),
    ],
)
def test_16_bit_gradients_of_reductions(mesh_of, rng, reduction, exchange, padding_idx, dtype):
    emb = layer(mesh_of((4,)), dtype=dtype, reduction=reduction, exchange=exchange, padding_idx=padding_idx)
    upstream = integers(rng, dtype)
    if reduction == "reduce_scatter":
        upstream = on(emb.mesh, upstream, "tp", None)
    for grad in (jax.jit(jax.grad(loss)), jax.grad(loss)):
        found = grad(emb, IDS, upstream).weight
        assert found.dtype == dtype
        assert found.sharding.is_equivalent_to(emb.weight.sharding, 2)
        np.testing.assert_array_equal(found, oracle(IDS, upstream, padding_idx))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slower(jnp.float16)])
def test_5000_equal_ids_do_not_saturate(mesh_of, dtype):
    emb = ParallelVocabEmbedding(40000, 2, mesh_of((2,)), dtype=dtype, reduction="all_reduce")
    grad = jax.jit(jax.grad(lambda emb: emb(np.full(5000, 39999)).astype(jnp.float32).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[39999], np.asarray(5000, dtype))
    assert not np.asarray(grad)[:39999].any()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 4), jnp.bfloat16), slower((2, 4), jnp.float16), *map(slower, [(1, 4)] * 2, (jnp.float16, jnp.bfloat16))],
)
def test_5000_equal_ids_over_data_ranks_do_not_saturate(mesh_of, dtype, shape):
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = ParallelVocabEmbedding(8, 4, mesh, dtype=dtype)
    ids = on(mesh, np.full(5000, 6, np.int32), "dp")
    grad = jax.jit(jax.grad(lambda emb: emb(ids).astype(jnp.float32).sum()))(emb).weight
    expected = np.zeros((8, 4), dtype)
    expected[6] = 5000
    np.testing.assert_array_equal(grad, expected)


def test_sums_round_once(mesh_of):
    emb = layer(mesh_of((2,)), dtype=jnp.bfloat16, reduction="all_reduce")
    terms = jnp.asarray([256, 1, 1, 1], jnp.bfloat16)[:, None]  # 258 is rounded twice on the way, 259 -> 260 once
    grad = jax.jit(jax.grad(loss))(emb, np.full(4, 3), terms).weight
    assert (np.asarray(grad)[3] == 260).all()


@pytest.mark.parametrize("shape", [(2, 3), slower((1, 3))])
def test_sums_round_once_over_data_ranks(mesh_of, shape):
    """259 + 2 ones are 261, in bfloat16 260; were each data rank to round its own sum first, it would be 260 + 2."""
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = ParallelVocabEmbedding(6, 4, mesh, dtype=jnp.bfloat16)
    ids = on(mesh, np.array([1] * 259 + [5] * 2 + [1] * 2 + [5] * 259), "dp")
    grad = jax.jit(jax.grad(lambda emb: emb(ids).astype(jnp.float32).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[[1, 5], 0], np.array([260, 260], jnp.bfloat16))


@pytest.mark.parametrize("reduction", ["all_reduce", slower("none")])
def test_nan_reaches_only_its_row(mesh_of, rng, reduction):
    emb = layer(mesh_of((4,)), dtype=jnp.bfloat16, reduction=reduction)
    upstream = integers(rng, jnp.bfloat16).at[3].set(jnp.nan).at[0].set(jnp.inf)  # of id 1, and of nobody's
    found = np.asarray(pull_back(emb, IDS, upstream)).astype(np.float32)
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("padding_idx", [5, slower(None)])
def test_forward_mode_and_second_order(mesh_of, rng, padding_idx):
    emb = ParallelVocabEmbedding(12, 2, mesh_of((3,)), padding_idx=padding_idx)
    ids = np.array([[0, 5, 4], [11, 5, -1]])
    _, tangent = jax.jvp(lambda emb: emb(ids), (emb,), (jax.tree.map(jnp.ones_like, emb),))
    counted = np.stack([emb.partition.owns(ids, r) & (ids != padding_idx) for r in range(3)])
    np.testing.assert_array_equal(tangent, np.repeat(counted[..., None], 2, axis=-1))
    direction = emb.with_weight(rng.standard_normal((12, 2)).astype(np.float32))
    forward_over_reverse = jax.jit(lambda emb, d: jax.jvp(jax.grad(lambda emb: (emb(ids) ** 3).sum()), (emb,), (d,))[1])
    counts = np.bincount(ids[(ids >= 0) & (ids != padding_idx)], minlength=12)[:, None]
    expected = counts * 6 * np.asarray(emb.weight) * np.asarray(direction.weight)
    found = forward_over_reverse(emb, direction).weight
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("padding_idx", [700, slower(None)])
def test_forward_mode_and_second_order_in_16_bits(mesh_of, padding_idx):
    emb = layer(mesh_of((4,)), dtype=jnp.bfloat16, reduction="all_reduce", padding_idx=padding_idx)
    direction = jax.tree.map(lambda t: jnp.round(4 * t), emb)
    _, tangent = jax.jvp(lambda emb: emb(IDS), (emb,), (direction,))
    expected = jax.jit(lambda emb: emb(IDS))(direction)
    if padding_idx is not None:
        expected = jnp.where((padding_idx == IDS)[:, None], 0, expected)
    np.testing.assert_array_equal(tangent, expected)

    # Of sum(E**2) / 2 the gradient of a row is its occurrences times the row, and so is the Hessian times a direction.
    def half_square(emb):
        return (emb(IDS).astype(jnp.float32) ** 2).sum() / 2

    counts = np.bincount(IDS[(IDS >= 0) & (IDS < VOCAB) & (padding_idx != IDS)], minlength=VOCAB)
    expected = (counts[:, None] * np.asarray(direction.weight).astype(np.float32)).astype(jnp.bfloat16)
    forward_over_reverse = jax.jit(lambda emb, d: jax.jvp(jax.grad(half_square), (emb,), (d,))[1].weight)
    np.testing.assert_array_equal(forward_over_reverse(emb, direction), expected)

    @jax.jit
    def reverse_over_reverse(emb, direction):
        dot = lambda emb: (jax.grad(half_square)(emb).weight * direction.weight).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(dot)(emb).weight

    np.testing.assert_array_equal(reverse_over_reverse(emb, direction), expected)


def test_16_bit_vmap_scan_and_checkpoint(mesh_of, rng):
    emb = layer(mesh_of((2,)), dtype=jnp.bfloat16, reduction="all_reduce")
    batches, upstreams = np.stack([IDS, IDS[::-1]]), integers(rng, jnp.bfloat16, (2, len(IDS), EMB))
    expected = [oracle(ids, grad) for ids, grad in zip(batches, upstreams, strict=True)]
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(emb, batches, upstreams)
    np.testing.assert_array_equal(each.weight, expected)
    # The derivative of what is batched, and the batch of what is derived twice.
    together = jax.jit(jax.grad(lambda emb: jax.vmap(loss, (None, 0, 0))(emb, batches, upstreams).sum()))(emb)
    both = (expected[0].astype(np.float32) + expected[1].astype(np.float32)).astype(expected[0].dtype)
    np.testing.assert_array_equal(together.weight, both)

    @jax.jit
    def scanned(emb):
        def step(total, batch):
            return total + jax.checkpoint(loss)(emb, *batch), None

        return jax.lax.scan(step, jnp.zeros(()), (jnp.asarray(batches), upstreams))[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(scanned))(emb).weight, both)


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
