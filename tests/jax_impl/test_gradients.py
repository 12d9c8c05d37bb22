"""Sums, derivatives of higher order, and gradients under JAX's transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from marks import slower
from meshes import on

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition
from shared.proof.oracle import weight_grad

VOCAB, EMB = 2048, 6
# Repeated ids, neighbours at the ranks' borders, and ids that nobody has.
IDS = np.concatenate([[-1, 0, 0, 1, 511, 512, 513, 2047, 2048, 2**31 - 1], np.full(22, 700), np.arange(1020, 1028)])


def layer(mesh, reduction="all_reduce", dtype=jnp.bfloat16, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, mesh, dtype=dtype, reduction=reduction, **options)


@pytest.mark.parametrize("shape", [(2, 3), slower((1, 3))])
def test_sums_over_data_ranks_round_once_and_do_not_saturate(mesh_of, shape):
    """259 + 2 ones are 261, in bfloat16 260; were each data rank to round its own sum first, it would be 260 + 2."""
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = ParallelVocabEmbedding(6, 4, mesh, dtype=jnp.bfloat16)
    halves = [1] * 259 + [5] * 2 + [3] * 2500, [1] * 2 + [5] * 259 + [3] * 2500
    ids = on(mesh, np.array([*halves[0], *halves[1]]), "dp")
    grad = jax.jit(jax.grad(lambda emb: emb(ids).astype(jnp.float32).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], np.array([0, 260, 0, 5000, 0, 260], jnp.bfloat16))


@pytest.mark.parametrize(
    ("reduction", "exchange", "dtype", "invalid_ids"),
    [
        ("none", "auto", jnp.float32, "zero"),
        ("all_reduce", "auto", jnp.bfloat16, "error"),
        slower("reduce_scatter", "dense", jnp.bfloat16, "zero"),
        slower("reduce_scatter", "routed", jnp.float32, "error"),
        slower("all_to_all", "routed", jnp.float32, "zero"),
    ],
)
def test_forward_mode_and_second_order(mesh_of, reduction, exchange, dtype, invalid_ids):
    """Of sum(E**2) / 2 the gradient of a row is its occurrences times the row, and so is the Hessian times a direction."""
    emb = layer(mesh_of((4,)), reduction, dtype, exchange=exchange, padding_idx=700, invalid_ids=invalid_ids)
    direction = jax.tree.map(lambda t: jnp.round(4 * t), emb)  # integers, whose sums are exact

    def half_square(emb, ids):
        return (emb(ids).astype(jnp.float32) ** 2).sum() / 2

    def derivatives(emb, direction, ids):
        gradient = lambda emb: jax.grad(half_square)(emb, ids)  # noqa: E731
        dot = lambda emb: (gradient(emb).weight * direction.weight).astype(jnp.float32).sum()  # noqa: E731
        tangent = jax.jvp(lambda emb: emb(ids), (emb,), (direction,))[1]
        forward_over_reverse = jax.jvp(gradient, (emb,), (direction,))[1].weight
        return tangent, direction(ids), forward_over_reverse, jax.grad(dot)(emb).weight

    error, found = jax.jit(checkify.checkify(derivatives))(emb, direction, jnp.asarray(IDS, jnp.int32))
    assert (error.get() is None) == (invalid_ids == "zero")
    tangent, rows, forward_over_reverse, reverse_over_reverse = map(np.asarray, found)
    np.testing.assert_array_equal(tangent, np.where((IDS == 700)[:, None], 0, rows))
    counts = np.bincount(IDS[(IDS >= 0) & (IDS < VOCAB) & (IDS != 700)], minlength=VOCAB)
    expected = (counts[:, None] * np.asarray(direction.weight).astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(forward_over_reverse, expected)
    np.testing.assert_array_equal(reverse_over_reverse, expected)


@pytest.mark.parametrize(
    ("reduction", "exchange", "dtype"),
    [
        ("all_reduce", "auto", jnp.bfloat16),
        ("none", "auto", jnp.float32),
        slower("reduce_scatter", "dense", jnp.bfloat16),
        slower("reduce_scatter", "routed", jnp.float32),
        slower("all_to_all", "routed", jnp.float32),
    ],
)
def test_vmap_scan_and_checkpoint(mesh_of, rng, reduction, exchange, dtype):
    emb, whole = layer(mesh_of((2,)), reduction, dtype, exchange=exchange), VocabPartition(VOCAB, 1)
    batches = np.stack([IDS, np.arange(len(IDS))]).astype(np.int32)  # the second needs too many rows to be routed
    upstreams = rng.integers(-7, 8, (2, len(IDS), EMB)).astype(dtype)
    expected = [weight_grad(upstream, ids, whole, 0) for ids, upstream in zip(batches, upstreams, strict=True)]

    def loss(emb, ids, upstream):
        return (emb(ids).astype(jnp.float32) * upstream.astype(jnp.float32)).sum()

    def scanned(emb, batches):
        def step(total, batch):
            return total + jax.checkpoint(loss)(emb, *batch), None

        return jax.lax.scan(step, jnp.zeros(()), batches)[0]

    @jax.jit
    def derivatives(emb, batches):
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(emb, *batches)
        together = jax.grad(lambda emb: jax.vmap(loss, (None, 0, 0))(emb, *batches).sum())(emb)
        return jax.vmap(emb)(batches[0]), each.weight, together.weight, jax.grad(scanned)(emb, batches).weight

    rows, each, together, in_a_scan = derivatives(emb, (batches, upstreams))
    np.testing.assert_array_equal(rows, np.stack([emb(ids) for ids in batches]))
    np.testing.assert_array_equal(each, expected)
    both = (expected[0].astype(np.float32) + expected[1].astype(np.float32)).astype(expected[0].dtype)
    np.testing.assert_array_equal(together, both)
    np.testing.assert_array_equal(in_a_scan, both)
