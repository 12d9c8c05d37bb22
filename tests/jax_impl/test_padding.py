"""Rows of padding: zero, no id's, without a gradient; and ranks that have nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_is_right, make_mesh

from jax_impl import ParallelVocabEmbedding

IDS = np.array([[0, 9, 10, 11], [2, 3, 3, -1], [12, 5, 9, 8], [8, 8, 0, 1]])  # 10 and 11 may be padding, 12 is past it


@pytest.mark.parametrize(
    ("reduction", "exchange"), [("all_reduce", "dense"), ("reduce_scatter", "routed"), ("all_to_all", "dense")]
)
def test_every_reduction_with_padding(reduction, exchange):
    """On 4 ranks, of which the last has padding only, and whatever the padding's rows hold."""
    options = {"padded_vocab_size": 16, "reduction": reduction, "exchange": exchange}
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), **options)
    assert np.asarray(emb.weight)[:10].all()
    assert not np.asarray(emb.weight)[10:].any()
    assert_is_right(emb.with_weight(emb.weight.at[10:].set(jnp.nan)), IDS)


def test_global_numbers_do_not_depend_on_the_layout(mesh_of):
    options = {"init": "global", "init_std": 0.02, "padding_idx": 4}
    plain = np.asarray(ParallelVocabEmbedding(10, 3, mesh_of((1,)), **options).weight)
    assert (plain.any(1) == (np.arange(10) != 4)).all()
    mesh = mesh_of((2, 4), ("dp", "tp"))
    for padded in ("even", 32):
        make = lambda padded=padded: ParallelVocabEmbedding(10, 3, mesh, padded_vocab_size=padded, **options)  # noqa: E731
        for table in (make().weight, jax.jit(make)().weight):
            np.testing.assert_array_equal(table, np.pad(plain, ((0, len(table) - 10), (0, 0))))


def test_a_head_of_the_callers_own():
    """It trains padding rows, and no others that it should not, unless their gradient is removed."""
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=16, padding_idx=9)

    @jax.jit
    def gradients(emb):
        grads = jax.grad(lambda emb: (emb(IDS) ** 2).sum() + jax.nn.logsumexp(jnp.ones(3) @ emb.weight.T))(emb)
        return grads, emb.zero_padding_grad(grads)

    given, kept = gradients(emb)
    assert np.asarray(given.weight)[9:].all()
    np.testing.assert_array_equal(kept.weight, np.asarray(given.weight) * (np.arange(16) < 10)[:, None])
    assert jax.tree.structure(kept) == jax.tree.structure(emb)
    np.testing.assert_array_equal(emb.zero_padding_grad(given).weight, kept.weight)
    assert np.asarray(given.weight)[9:].all()  # which is still there
