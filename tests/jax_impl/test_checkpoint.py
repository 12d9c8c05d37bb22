"""Orbax: what was saved on one mesh is restored on another, however either pads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from marks import slower
from meshes import make_mesh

from jax_impl import ParallelVocabEmbedding, restore_args


def make(shape, padded, abstract=False, **options):
    build = ParallelVocabEmbedding.abstract if abstract else ParallelVocabEmbedding
    mesh = make_mesh(shape, ("dp", "tp")[-len(shape) :])
    return build(10, 3, mesh, dtype=jnp.bfloat16, padded_vocab_size=padded, **options)


def restore(path, target):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, ocp.args.PyTreeRestore(target, restore_args(target)))


def test_of_the_same_size_onto_another_mesh(tmp_path):
    saved, target = make((4,), "even", init="global"), {"emb": make((2, 4), 12), "step": 0}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"emb": saved, "step": 7})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(tmp_path / "checkpoint", {"emb": make((3,), 30), "step": 0})
    assert restored["step"] == 7
    assert restored["emb"].partition == target["emb"].partition
    assert restored["emb"].weight.sharding.is_equivalent_to(target["emb"].weight.sharding, 2)
    np.testing.assert_array_equal(restored["emb"].weight, saved.weight)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


@jax.jit
def train(model, moments, ids):
    def loss(model):
        return jnp.sin(model["emb"](ids).sum(0) @ model["head"]).sum()

    updates, moments = OPTIMIZER.update(jax.grad(loss)(model), moments, model)
    return optax.apply_updates(model, updates), moments


def training_state(emb, head):
    model = {"emb": emb, "head": head}
    moments = OPTIMIZER.init(model) if isinstance(head, jax.Array) else jax.eval_shape(OPTIMIZER.init, model)
    return {"model": model, "moments": moments, "step": 7, "key": jax.random.key(3)}


@pytest.mark.parametrize(("world_size", "padded"), [(8, "even"), slower(3, 30), slower(1, None)])
def test_restored_training_state_continues(tmp_path, world_size, padded):
    ids, head = np.array([0, 9, 9, 4]), jnp.ones((3, 2), jnp.bfloat16)
    state = training_state(make((4,), "even", init="global"), head)
    state["model"], state["moments"] = train(state["model"], state["moments"], ids)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    target = training_state(make((world_size,), padded, abstract=True), jax.ShapeDtypeStruct(head.shape, head.dtype))
    restored = restore(tmp_path / "checkpoint", target)
    assert restored["step"] == 7
    assert restored["key"] == state["key"]
    split = NamedSharding(restored["model"]["emb"].mesh, PartitionSpec("tp", None))
    assert restored["moments"][1][0].mu["emb"].weight.sharding == split
    results = [train(each["model"], each["moments"], ids) for each in (state, restored)]
    for here, there in zip(*map(jax.tree.leaves, results), strict=True):
        assert here.shape[1:] == there.shape[1:]
        rows = slice(10) if there.ndim == 2 else ...
        np.testing.assert_array_equal(np.asarray(here)[rows], np.asarray(there)[rows])
        assert there.ndim < 2 or not np.asarray(there)[10:].any()


def test_a_tree_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="tree must hold a ParallelVocabEmbedding"):
        restore_args({"step": 0})
