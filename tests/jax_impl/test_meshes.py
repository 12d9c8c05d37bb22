"""How tables may lie on a mesh; lookups under vmap and beside or inside the caller's own shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import assert_is_right, make_mesh, on

from jax_impl import ParallelVocabEmbedding, partial_lookup
from shared import VocabPartition

IDS = np.array([[0, 5, 4, 12], [11, 5, -1, 7]], np.int32)
TABLE, PARTITION = np.ones((12, 4), np.float32), VocabPartition(12, 3)


def test_a_table_put_in_by_a_tree_operation_may_lie_in_any_way(mesh_of, rng):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    table, ids = rng.standard_normal((48, 6)).astype(np.float32), np.arange(-2, 50)
    expected = np.asarray(emb.with_weight(table)(ids))
    for given in (table, jnp.asarray(table), on(mesh, table), on(mesh, table, "dp"), on(mesh, table, ("dp", "tp"))):
        other = jax.tree.map(lambda _, given=given: given, emb)
        np.testing.assert_array_equal(other(ids), expected)
    np.testing.assert_array_equal(jax.jit(lambda emb, ids: emb(ids))(other, ids), expected)


def test_the_vocabulary_may_lie_on_any_axis(mesh_of):
    emb = ParallelVocabEmbedding(48, 6, mesh_of((2, 4), ("dp", "sp")), "dp")
    assert emb.world_size == 2
    assert emb.weight.sharding.spec == P("dp", None)
    np.testing.assert_array_equal(np.asarray(emb(np.arange(48))).sum(0), emb.weight)


def test_another_mesh_in_force_is_refused():
    emb = ParallelVocabEmbedding(12, 4, make_mesh((2, 2), ("dp", "tp")))
    with (
        jax.set_mesh(make_mesh((4, 2), ("tp", "sp"))),
        pytest.raises(ValueError, match=r"the mesh that is set must be the layer's, \{'dp': 2, 'tp': 2\}, got"),
    ):
        emb(np.arange(4))


@pytest.mark.parametrize(
    ("shape", "seq_dim", "exchange"),
    [((4, 3), 0, "dense"), ((8, 4, 2), 0, "routed"), ((8,), 0, "routed"), ((2, 8), -1, "dense")],
)
def test_the_sequence_inside_jit_beside_data(shape, seq_dim, exchange):
    """Nobody says how ids are split over the data axis: the sequence is not split over it."""
    options = {"reduction": "reduce_scatter", "exchange": exchange, "seq_dim": seq_dim, "padding_idx": 0}
    emb = ParallelVocabEmbedding(12, 4, make_mesh((4, 2), ("dp", "tp")), **options)
    assert_is_right(emb, np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 12)


@pytest.fixture
def emb(mesh_of):
    return ParallelVocabEmbedding(12, 4, mesh_of((3,)), padding_idx=5)


def test_vmap_over_ids_tables_and_both(emb):
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), emb)

    @jax.jit
    def mapped(emb, two, ids):
        over_both = jax.vmap(lambda emb, ids: emb(ids), out_axes=1)(two, ids)
        return jax.vmap(emb, out_axes=1)(ids), jax.vmap(emb, 1, 2)(ids), jax.vmap(lambda emb: emb(ids))(two), over_both

    expected = np.asarray(emb(IDS))
    over_rows, over_columns, over_tables, over_both = mapped(emb, two, jnp.asarray(IDS))
    np.testing.assert_array_equal(over_rows, expected)
    np.testing.assert_array_equal(over_columns, expected)
    np.testing.assert_array_equal(over_tables, np.stack([expected, 2 * expected]))
    np.testing.assert_array_equal(over_both, expected * np.array([1, 2])[:, None, None])


def test_own_shard_map_is_refused_and_names_the_function(emb):
    mapped = jax.shard_map(lambda emb: emb(IDS), in_specs=(P("tp", None),), out_specs=P("tp"))
    with pytest.raises(ValueError, match="call jax_impl.functional.partial_lookup"):
        mapped(emb)


def test_inside_a_shard_map_over_another_axis(mesh_of):
    mesh = mesh_of((2, 2), ("dp", "tp"))
    emb, ids = ParallelVocabEmbedding(12, 4, mesh), on(mesh, IDS, "dp")
    mapped = jax.shard_map(
        lambda emb, ids: emb(ids), in_specs=(P(), P("dp")), out_specs=P(None, "dp"), axis_names={"dp"}
    )
    np.testing.assert_array_equal(jax.jit(mapped)(emb, ids), emb(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": VocabPartition(24, 3)}, r"weight must hold the rank's own rows, \[8, emb_size\], got \(4, 4\)"),
        ({"partition": VocabPartition(8, 2)}, "world_size must be the size of the axis 'tp': got 2, the axis has 3"),
        ({"partition": VocabPartition(3 * 2**31, 3)}, "must fit JAX's int32 indices"),
        ({"padding_idx": 12}, "padding_idx must be"),
        ({"ids": IDS.astype(np.float32)}, "ids must be an array of an integer dtype, got dtype float32"),
        ({"ids": np.arange(6), "tokens": ("tp",)}, "ids must be the same on all ranks of the axis 'tp', but they vary"),
        ({"check_vma": False}, "check_vma must be True in the shard_map around"),
        ({"axis_name": ("tp",)}, r"axis_name must be a string, the name of one mesh axis, got \('tp',\)"),
        ({"table": TABLE.astype(np.int8)}, "int8"),
    ],
)
def test_the_pure_function_refuses_what_does_not_fit(changes, message):
    def run(table=TABLE, ids=IDS, partition=PARTITION, axis_name="tp", tokens=(), check_vma=True, **options):
        mapped = jax.shard_map(
            lambda weight, ids: partial_lookup(weight, ids, partition, axis_name, **options),
            mesh=make_mesh((3,)),
            in_specs=(P("tp", None), P(*tokens)),
            out_specs=P("tp"),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(table, ids)

    with pytest.raises((ValueError, TypeError), match=message):
        run(**changes)
