"""What the compiler makes of it: collectives counted in the compiled program, and how results are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import pairwise, slower
from meshes import collectives, on

from jax_impl import ParallelVocabEmbedding


def test_the_counter_sees_collectives(mesh_of):
    mesh = mesh_of()
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "tp"), mesh=mesh, in_specs=P("tp"), out_specs=P())
    assert collectives(summed, on(mesh, np.ones(8, np.float32), "tp")) == {"all-reduce": 1}


@pytest.mark.parametrize(
    ("dtype", "shape"),
    pairwise([(jnp.float32, (3,)), (jnp.bfloat16, (8,))], [jnp.float32, jnp.bfloat16], [(1,), (3,), (8,)]),
)
def test_no_collective_forward_or_backward(mesh_of, shape, dtype):
    mesh = mesh_of(shape)
    emb = ParallelVocabEmbedding(48, 6, mesh, dtype=dtype, padding_idx=4)
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16))
    out = emb(ids)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("tp")), out.ndim)
    assert collectives(lambda emb, ids: emb(ids), emb, ids) == {}
    backward = lambda emb, ids, g: jax.vjp(lambda emb: emb(ids), emb)[1](g)  # noqa: E731
    assert collectives(backward, emb, ids, out) == {}


def test_ids_split_over_data_stay_so(mesh_of):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(4096, 6, mesh)
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16), "dp")
    out = emb(ids)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", "dp")), out.ndim)
    assert collectives(lambda emb, ids: emb(ids), emb, ids) == {}
    backward = lambda emb, ids, g: jax.vjp(lambda emb: emb(ids), emb)[1](g)  # noqa: E731
    used = collectives(backward, emb, ids, out)
    assert set(used) <= {"all-reduce", "all-gather"}, used
    assert 1 <= sum(used.values()) <= 2, "data ranks add their gradients up once, or gather what to add"


@pytest.mark.parametrize(
    "spec", [("dp", "sp"), (("dp", "tp"),), *map(slower, [(), ("dp",), (None, "sp"), (("dp", "sp"),), ("tp",)])]
)
def test_ids_split_in_any_way_give_the_same(mesh_of, spec):
    mesh = mesh_of((2, 2, 2), ("dp", "sp", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    ids = np.random.default_rng(0).integers(-2, 50, (4, 8))
    expected = np.asarray(emb(ids))
    np.testing.assert_array_equal(emb(on(mesh, ids, *spec)), expected)


def test_a_table_put_in_by_a_tree_operation_may_lie_in_any_way(mesh_of, rng):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    table, ids = rng.standard_normal((48, 6)).astype(np.float32), np.arange(-2, 50)
    expected = np.asarray(emb.with_weight(table)(ids))
    for given in (table, jnp.asarray(table), on(mesh, table), on(mesh, table, ("dp", "tp")), on(mesh, table, "dp")):
        other = jax.tree.map(lambda _, given=given: given, emb)
        np.testing.assert_array_equal(other(ids), expected)
        np.testing.assert_array_equal(jax.jit(lambda emb: emb(ids))(other), expected)


def test_axes_whose_names_contain_each_other(mesh_of, rng):
    mesh = mesh_of((2, 4), ("tp2", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    ids = on(mesh, rng.integers(0, 48, (4, 8)), "tp2")
    assert emb(ids).sharding.is_equivalent_to(NamedSharding(mesh, P("tp", "tp2")), 4)
    np.testing.assert_array_equal(np.asarray(emb(ids)).sum(0), np.asarray(emb.weight)[np.asarray(ids)])


@pytest.mark.parametrize("axis_name", ["dp", slower("sp")])
def test_the_vocabulary_may_lie_on_any_axis(mesh_of, axis_name):
    mesh = mesh_of((2, 4), ("dp", "sp"))
    emb = ParallelVocabEmbedding(48, 6, mesh, axis_name)
    assert emb.world_size == {"dp": 2, "sp": 4}[axis_name]
    assert emb.weight.sharding.spec == P(axis_name, None)
    np.testing.assert_array_equal(np.asarray(emb(np.arange(48))).sum(0), emb.weight)


def test_mixed_axes(rng):
    kinds = (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"), kinds)
    with jax.set_mesh(mesh):
        emb = ParallelVocabEmbedding(48, 6, mesh)
        ids = on(mesh, rng.integers(0, 48, (4, 8)), "dp")
        np.testing.assert_array_equal(np.asarray(emb(ids)).sum(0), np.asarray(emb.weight)[np.asarray(ids)])
        assert emb(ids).sharding.is_equivalent_to(NamedSharding(mesh, P("tp", "dp")), 4)
        assert collectives(lambda emb, ids: emb(ids), emb, ids) == {}


def test_the_table_is_not_a_constant_of_the_compiled_program(mesh_of):
    emb = ParallelVocabEmbedding(4096, 64, mesh_of())
    ids = jnp.arange(8)
    size = jax.jit(lambda emb, ids: emb(ids)).lower(emb, ids).compile().memory_analysis().generated_code_size_in_bytes
    assert size < 4096 * 64 * 4 / 8


def test_another_mesh_in_force_is_refused():
    devices, auto = jax.devices(), (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), auto, devices=devices[:4])
    other = jax.make_mesh((4, 2), ("tp", "sp"), auto, devices=devices)
    emb = ParallelVocabEmbedding(12, 4, mesh)
    with (
        jax.set_mesh(other),
        pytest.raises(ValueError, match=r"the mesh that is set must be the layer's, \{'dp': 2, 'tp': 2\}, got"),
    ):
        emb(np.arange(4))


@pytest.mark.parametrize(
    ("shape", "seq_dim"),
    [
        ((4, 3), 0),
        *(slower(*each) for each in (((8, 3), 0), ((8,), 0), ((2, 8), -1), ((3, 8), 1))),
    ],
)
def test_the_sequence_inside_jit_beside_data(shape, seq_dim):
    """Nobody says how ids are split over the data axis: the sequence is not split over it."""
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
    emb = ParallelVocabEmbedding(12, 4, mesh, reduction="reduce_scatter", seq_dim=seq_dim)
    ids = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 12
    np.testing.assert_array_equal(jax.jit(emb)(jnp.asarray(ids)), np.asarray(emb.weight)[ids])
    stacked = jnp.stack([jnp.asarray(ids)] * 2)
    np.testing.assert_array_equal(jax.vmap(emb)(stacked), np.asarray(emb.weight)[np.stack([ids] * 2)])
    gradient = jax.jit(jax.grad(lambda emb: emb(jnp.asarray(ids)).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(gradient)[:, 0], np.bincount(ids.ravel(), minlength=12))
