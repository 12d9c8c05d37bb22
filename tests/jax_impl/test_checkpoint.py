"""Orbax: what was saved on one mesh is restored on another, however either pads."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_impl import ParallelVocabEmbedding, restore_args


def make(shape, padded, names=("tp",), **options):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape), devices=devices)
    return ParallelVocabEmbedding(10, 3, mesh, dtype=jnp.bfloat16, padded_vocab_size=padded, **options)


@pytest.fixture
def saved(tmp_path):
    emb = make((4,), "even", init="global")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"emb": emb, "step": 7})
    return tmp_path / "checkpoint", np.asarray(emb.weight)[:10]


@pytest.mark.parametrize(("shape", "names"), [((2,), ("tp",)), ((6,), ("tp",)), ((2, 4), ("dp", "tp"))])
def test_of_the_same_size_onto_another_mesh(saved, shape, names):
    path, table = saved
    target = {"emb": make(shape, 12, names), "step": 0}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, target)
    assert restored["step"] == 7
    assert restored["emb"].partition == target["emb"].partition
    assert restored["emb"].weight.sharding.is_equivalent_to(target["emb"].weight.sharding, 2)
    np.testing.assert_array_equal(np.asarray(restored["emb"].weight)[:10], table)


@pytest.mark.parametrize(("world_size", "padded"), [(1, None), (2, None), (3, 30), (8, "even")])
@pytest.mark.parametrize("abstract", [False, True])
def test_of_another_size(saved, world_size, padded, abstract):
    path, table = saved
    target = make((world_size,), padded)
    if abstract:
        target = jax.eval_shape(lambda: make((world_size,), padded))
    how = ocp.args.PyTreeRestore({"emb": target, "step": 0}, {"emb": restore_args(target), "step": ocp.RestoreArgs()})
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, how)["emb"]
    assert restored.weight.shape == (target.padded_vocab_size, 3)
    assert restored.weight.sharding.spec == PartitionSpec("tp", None)
    np.testing.assert_array_equal(np.asarray(restored.weight)[:10], table)
    assert not np.asarray(restored.weight)[10:].any()
    np.testing.assert_array_equal(np.asarray(restored(np.array([9, 10])))[:, 0].sum(0), table[9])


def test_without_these_arguments_another_size_is_refused(saved):
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match="shape"):
        checkpointer.restore(saved[0], {"emb": make((3,), 30), "step": 0})
