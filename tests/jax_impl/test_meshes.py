"""How ids and tables may lie on a mesh, and how results lie there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_is_right, backward, collectives, compiled, make_mesh, on

from jax_impl import ParallelVocabEmbedding


def call(emb, ids):
    return emb(ids)


def test_ids_split_over_data_stay_so(mesh_of, rng):
    mesh = mesh_of((2, 4), ("tp2", "tp"))  # names that contain each other
    emb = ParallelVocabEmbedding(4096, 6, mesh)
    ids = on(mesh, rng.integers(0, 4096, (4, 16)).astype(np.int32), "tp2")
    out = emb(ids)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", "tp2")), out.ndim)
    np.testing.assert_array_equal(np.asarray(out).sum(0), np.asarray(emb.weight)[np.asarray(ids)])
    assert collectives(compiled(call, emb, ids)) == {}
    used = collectives(compiled(backward, emb, ids, out))
    assert set(used) <= {"all-reduce", "all-gather"}, used
    assert 1 <= sum(used.values()) <= 2, "data ranks add their gradients up once, or gather what to add"


def test_ids_split_in_any_way_give_the_same(mesh_of, rng):
    mesh = mesh_of((2, 2, 2), ("dp", "sp", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    ids = rng.integers(-2, 50, (4, 8))
    expected = np.asarray(emb(ids))
    for spec in (("dp", "sp"), (("dp", "tp"),), (None, "sp"), ("tp",)):
        np.testing.assert_array_equal(emb(on(mesh, ids, *spec)), expected, err_msg=str(spec))


def test_a_table_put_in_by_a_tree_operation_may_lie_in_any_way(mesh_of, rng):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(48, 6, mesh)
    table, ids = rng.standard_normal((48, 6)).astype(np.float32), np.arange(-2, 50)
    expected = np.asarray(emb.with_weight(table)(ids))
    for given in (table, jnp.asarray(table), on(mesh, table), on(mesh, table, "dp"), on(mesh, table, ("dp", "tp"))):
        other = jax.tree.map(lambda _, given=given: given, emb)
        np.testing.assert_array_equal(other(ids), expected)
    np.testing.assert_array_equal(jax.jit(call)(other, ids), expected)


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
