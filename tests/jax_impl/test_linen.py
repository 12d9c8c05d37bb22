"""Flax Linen: a module around the layer, beside Linen's own Embed."""

import functools

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding


class VocabEmbed(nn.Module):
    vocab_size: int
    emb_size: int
    mesh: Mesh

    @nn.compact
    def __call__(self, ids):
        arguments = self.vocab_size, self.emb_size, self.mesh
        options = {"padded_vocab_size": "even", "reduction": "all_reduce"}

        def table(key):
            return ParallelVocabEmbedding(*arguments, key=key, **options).weight

        weight = self.param("embedding", nn.with_partitioning(table, ("tp", None)))
        return ParallelVocabEmbedding.abstract(*arguments, **options).with_weight(weight)(ids)


OPTIMIZER, IDS = optax.adam(0.1), np.array([0, 9, 9, 3])


@functools.partial(jax.jit, static_argnums=0)
def train(model, params):
    gradient = jax.grad(lambda params: (model.apply(params, IDS) ** 3).sum())(params)
    updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(params))
    return model.apply(params, IDS), optax.apply_updates(params, updates)["params"]["embedding"]


def test_training(mesh_of):
    mesh, key = mesh_of((4,)), jax.random.key(0)
    model = VocabEmbed(10, 4, mesh)
    shardings = nn.get_sharding(jax.eval_shape(model.init, key, IDS), mesh)
    params = nn.unbox(jax.jit(model.init, out_shardings=shardings)(key, IDS))
    table = np.asarray(params["params"]["embedding"])
    rows, trained = train(model, params)
    expected_rows, expected = train(nn.Embed(10, 4), {"params": {"embedding": table[:10]}})
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(np.asarray(trained)[:10], expected, rtol=1e-6)  # Adam's division, fused differently
    assert not np.asarray(trained)[10:].any()
    assert trained.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", None)), 2)
