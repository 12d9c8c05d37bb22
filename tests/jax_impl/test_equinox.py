"""Equinox: the layer inside a module, under its transformations and in its files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding


class Model(eqx.Module):
    embed: ParallelVocabEmbedding
    head: eqx.nn.Linear

    def __init__(self, mesh, *, key):
        key, embed_key = jax.random.split(key)
        options = {"padded_vocab_size": "even", "reduction": "all_reduce"}
        self.embed = ParallelVocabEmbedding(10, 4, mesh, key=embed_key, **options)
        self.head = eqx.nn.Linear(4, 3, key=key)

    def __call__(self, ids, *, key=None):
        body = eqx.nn.Sequential([self.embed, eqx.nn.Lambda(jnp.sin)])
        return jax.vmap(self.head)(body(ids, key=key))


OPTIMIZER = optax.adam(0.1)


@eqx.filter_jit
def train(model, moments, ids):
    gradient = eqx.filter_grad(lambda model: (model(ids, key=jax.random.key(0)) ** 2).sum())(model)
    updates, moments = OPTIMIZER.update(gradient, moments)
    return eqx.apply_updates(model, updates), moments


def test_training_and_files(mesh_of, tmp_path):
    mesh, ids = mesh_of((4,)), np.array([0, 9, 9, 3])
    first = Model(mesh, key=jax.random.key(0))
    model, _ = train(first, OPTIMIZER.init(eqx.filter(first, eqx.is_array)), ids)
    moved = (np.asarray(model.embed.weight) != np.asarray(first.embed.weight)).any(1)
    np.testing.assert_array_equal(moved, np.isin(np.arange(12), ids))
    assert model.embed.weight.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", None)), 2)

    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    read = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", eqx.filter_eval_shape(lambda: first))
    read = eqx.tree_at(lambda model: model.embed, read, replace_fn=lambda embed: embed.with_weight(embed.weight))
    assert read.embed.weight.sharding == NamedSharding(mesh, P("tp", None))
    np.testing.assert_array_equal(eqx.filter_jit(read)(ids), eqx.filter_jit(model)(ids))
