"""Rows of padding: zero, no id's, without a gradient; and ranks that have nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import pairwise, slower
from meshes import make_mesh

from jax_impl import ParallelVocabEmbedding

IDS = np.array([[0, 9, 10, 11], [2, 3, 3, -1], [12, 5, 9, 8], [8, 8, 0, 1]])  # 10 and 11 may be padding, 12 is past it


def unsharded(table, ids):
    valid = (ids >= 0) & (ids < 10)
    return np.where(valid[..., None], table[ids * valid], 0)


def gradient_of(table, upstream, padding_idx=None):
    gradient = np.zeros_like(table)
    for position, i in np.ndenumerate(IDS):
        if 0 <= i < 10 and i != padding_idx:
            gradient[i] += upstream[position]
    return gradient


@pytest.mark.parametrize(("world_size", "padded"), [slower(1, 12), (4, "even"), slower(8, 32)])
def test_the_sum_is_the_unsharded_lookup(mesh_of, world_size, padded):
    emb = ParallelVocabEmbedding(10, 3, mesh_of((world_size,)), padded_vocab_size=padded, padding_idx=3)
    table = np.asarray(emb.weight)
    assert table.shape == (emb.padded_vocab_size, 3)
    assert table[np.r_[0:3, 4:10]].all()
    assert not table[[3, *range(10, len(table))]].any()
    partials, back = jax.vjp(lambda emb: emb(IDS), emb)
    np.testing.assert_array_equal(np.asarray(partials).sum(0), unsharded(table, IDS))
    upstream = np.random.default_rng(0).integers(-4, 5, (*IDS.shape, 3)).astype(np.float32)
    cotangent = jax.device_put(np.stack([upstream] * world_size), partials.sharding)
    np.testing.assert_array_equal(np.asarray(back(cotangent)[0].weight), gradient_of(table, upstream, 3))


@pytest.mark.parametrize(
    ("reduction", "exchange"),
    pairwise(
        [("all_reduce", "dense"), ("reduce_scatter", "routed")], ["all_reduce", "reduce_scatter"], ["dense", "routed"]
    ),
)
def test_every_reduction_with_padding(reduction, exchange):
    """On 4 ranks, of which the last has padding only."""
    mesh = make_mesh()
    emb = ParallelVocabEmbedding(10, 3, mesh, padded_vocab_size=16, reduction=reduction, exchange=exchange)
    table = np.asarray(emb.weight)
    output, back = jax.vjp(lambda emb: emb(IDS), emb)
    np.testing.assert_array_equal(np.asarray(output), unsharded(table, IDS))
    upstream = np.random.default_rng(0).integers(-4, 5, output.shape).astype(np.float32)
    gradient = back(jax.device_put(upstream, output.sharding))[0].weight
    np.testing.assert_array_equal(np.asarray(gradient), gradient_of(table, upstream))


def test_padding_holds_nothing_whatever_its_rows_hold():
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=16)
    emb = emb.with_weight(np.full((16, 3), np.nan, np.float32))
    assert not np.asarray(emb(np.array([10, 15, 16, -1]))).any()
    checked = ParallelVocabEmbedding(10, 3, emb.mesh, padded_vocab_size=16, invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[1\] = 10 is outside the vocabulary \[0, 10\)"):
        checked(np.array([9, 10]))


def test_padding_stays_zero_while_the_rest_is_trained():
    """Adam with decoupled weight decay, written out."""
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=16)
    first, second, weight = 0.0, 0.0, emb
    for _ in range(3):
        gradient = jax.grad(lambda emb: (emb(IDS) ** 2).sum())(weight).weight
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        update = first / (jnp.sqrt(second) + 1e-8) + 0.1 * weight.weight
        weight = jax.tree.map(lambda w, u=update: w - 0.1 * u, weight)
    trained = np.asarray(weight.weight)
    assert (trained[[0, 1, 2]] != np.asarray(emb.weight)[[0, 1, 2]]).all()
    assert not trained[10:].any()


def test_global_numbers_do_not_depend_on_the_layout(mesh_of):
    plain = np.asarray(ParallelVocabEmbedding(10, 3, mesh_of((1,)), init="global", init_std=0.02).weight)
    for shape, names, padded in (((4,), ("tp",), "even"), ((2, 4), ("dp", "tp"), 32)):
        emb = ParallelVocabEmbedding(
            10, 3, mesh_of(shape, names), init="global", init_std=0.02, padded_vocab_size=padded, padding_idx=4
        )
        table = np.asarray(emb.weight)
        np.testing.assert_array_equal(table[np.r_[0:4, 5:10]], plain[np.r_[0:4, 5:10]])
        assert not table[[4, *range(10, len(table))]].any()
        traced = jax.jit(
            lambda emb=emb: type(emb)(10, 3, emb.mesh, init="global", init_std=0.02, padded_vocab_size="even")
        )()
        np.testing.assert_array_equal(np.asarray(traced.weight)[:10], plain)


def test_a_padded_size_that_will_not_do_is_refused():
    with pytest.raises(
        ValueError, match="padded_vocab_size must be at least vocab_size=10 and divisible by world_size=4"
    ):
        ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=14)
    with pytest.raises(ValueError, match=r"below 2\*\*31, got 2147483648"):
        ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=2**31)


@pytest.mark.parametrize("jitted", [slower(False), True])
def test_a_head_of_the_callers_own(jitted):
    """It trains padding rows, and no others that it should not, unless their gradient is removed."""
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=16, padding_idx=9)

    def gradient(emb, removed):
        grads = jax.grad(lambda emb: (emb(IDS) ** 2).sum() + jax.nn.logsumexp(jnp.ones(3) @ emb.weight.T))(emb)
        return emb.zero_padding_grad(grads) if removed else grads

    given, kept = ((jax.jit(gradient, static_argnums=1) if jitted else gradient)(emb, each) for each in (False, True))
    assert np.asarray(given.weight)[9:].all()
    np.testing.assert_allclose(np.asarray(kept.weight)[:10], np.asarray(given.weight)[:10], rtol=1e-6)
    assert not np.asarray(kept.weight)[10:].any()
    assert jax.tree.structure(kept) == jax.tree.structure(emb)
    np.testing.assert_array_equal(emb.zero_padding_grad(given).weight[:10], given.weight[:10])  # which is still there
