"""Under jit, vmap, scan, checkpoint, and inside the caller's own shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import pairwise, slower

from jax_impl import ParallelVocabEmbedding, partial_lookup
from shared import VocabPartition

IDS = np.array([[0, 5, 4, 12], [11, 5, -1, 7]], np.int32)


@pytest.fixture
def emb(mesh_of):
    return ParallelVocabEmbedding(12, 4, mesh_of((3,)), padding_idx=5)


def test_vmap_over_ids_tables_and_both(emb):
    expected = np.asarray(emb(IDS))
    np.testing.assert_array_equal(jax.vmap(emb, out_axes=1)(jnp.asarray(IDS)), expected)
    np.testing.assert_array_equal(jax.vmap(emb, 1, 2)(jnp.asarray(IDS)), expected)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), emb)
    np.testing.assert_array_equal(jax.vmap(lambda emb: emb(IDS))(two), np.stack([expected, 2 * expected]))
    both = jax.vmap(lambda emb, ids: emb(ids), out_axes=1)(two, jnp.asarray(IDS))
    np.testing.assert_array_equal(both, expected * np.array([1, 2])[:, None, None])


def test_per_sample_gradients(emb):
    def loss(emb, ids):
        return (emb(ids) ** 2).sum()

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(emb, jnp.asarray(IDS)).weight
    for sample, ids in zip(np.asarray(found), IDS, strict=True):
        np.testing.assert_array_equal(sample, jax.grad(loss)(emb, ids).weight)


def test_scan_and_checkpoint(emb):
    def loss(emb, ids):
        def body(total, row):
            return total + (jax.checkpoint(lambda emb, row: emb(row))(emb, row) ** 2).sum(), None

        return jax.lax.scan(body, 0.0, ids)[0]

    def plain(emb, ids):
        return sum((emb(row) ** 2).sum() for row in ids)

    scanned = jax.jit(jax.value_and_grad(loss))(emb, jnp.asarray(IDS))
    expected = jax.jit(jax.value_and_grad(plain))(emb, jnp.asarray(IDS))
    np.testing.assert_allclose(scanned[0], expected[0], rtol=32 * np.finfo(np.float32).eps)  # 32 terms, another order
    np.testing.assert_allclose(scanned[1].weight, expected[1].weight, rtol=4 * np.finfo(np.float32).eps)


def test_donated_and_updated_in_place(emb):
    step = jax.jit(lambda emb: jax.tree.map(lambda x: x + 1, emb), donate_argnums=0)
    before = np.asarray(emb.weight).copy()
    np.testing.assert_array_equal(step(emb).weight, before + 1)


def test_own_shard_map_is_refused_and_names_the_function(emb):
    mapped = jax.shard_map(lambda emb: emb(IDS), in_specs=(P("tp", None),), out_specs=P("tp"))
    with pytest.raises(ValueError, match="call jax_impl.functional.partial_lookup"):
        mapped(emb)


@pytest.mark.parametrize("names", [("dp", "tp"), slower(("tp", "dp"))])
def test_inside_a_shard_map_over_another_axis(mesh_of, names):
    mesh = mesh_of((2, 2), names)
    emb = ParallelVocabEmbedding(12, 4, mesh)
    ids = jax.device_put(IDS, NamedSharding(mesh, P("dp")))
    mapped = jax.shard_map(
        lambda emb, ids: emb(ids), in_specs=(P(), P("dp")), out_specs=P(None, "dp"), axis_names={"dp"}
    )
    np.testing.assert_array_equal(jax.jit(mapped)(emb, ids), emb(IDS))


@pytest.mark.parametrize(
    ("dtype", "padding_idx"), pairwise([(jnp.bfloat16, 5)], [jnp.float32, jnp.bfloat16], [None, 5])
)
def test_the_pure_function_in_the_callers_shard_map(mesh_of, dtype, padding_idx):
    mesh = mesh_of((2, 3), ("dp", "tp"))
    partition = VocabPartition(12, 3)
    emb = ParallelVocabEmbedding(12, 4, mesh, dtype=dtype)

    def embed(weight, ids):
        return jax.lax.psum(partial_lookup(weight, ids, partition, "tp", padding_idx=padding_idx), "tp")

    embed = jax.jit(jax.shard_map(embed, mesh=mesh, in_specs=(P("tp", None), P("dp")), out_specs=P("dp")))
    ids = jax.device_put(IDS, NamedSharding(mesh, P("dp")))
    expected = np.asarray(emb(IDS)).astype(np.float32).sum(0)
    np.testing.assert_array_equal(np.asarray(embed(emb.weight, ids)).astype(np.float32), expected)
    grad = jax.jit(jax.grad(lambda weight: embed(weight, ids).astype(jnp.float32).sum()))(emb.weight)
    counts = np.bincount(IDS[(IDS >= 0) & (IDS < 12) & (padding_idx != IDS)], minlength=12)
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], counts)


def test_the_pure_function_refuses_what_does_not_fit(mesh_of):
    mesh = mesh_of((3,))

    def run(weight, partition, ids=IDS, **options):
        mapped = jax.shard_map(
            lambda weight, ids: partial_lookup(weight, ids, partition, "tp", **options),
            mesh=mesh,
            in_specs=(P("tp", None), P()),
            out_specs=P("tp"),
        )
        return jax.jit(mapped)(jax.device_put(weight, NamedSharding(mesh, P("tp", None))), ids)

    table = np.ones((12, 4), np.float32)
    with pytest.raises(ValueError, match=r"weight must hold the rank's own rows, \[8, emb_size\], got \(4, 4\)"):
        run(table, VocabPartition(24, 3))
    with pytest.raises(ValueError, match="world_size must be the size of the axis 'tp': got 2, the axis has 3"):
        run(table, VocabPartition(8, 2))
    with pytest.raises(ValueError, match="padding_idx must be"):
        run(table, VocabPartition(12, 3), padding_idx=12)
    with pytest.raises(TypeError, match="ids must be an array of an integer dtype, got dtype float32"):
        run(table, VocabPartition(12, 3), ids=IDS.astype(np.float32))


def test_pure_function_refuses_an_unchecked_shard_map(mesh_of):
    mesh, partition = mesh_of((3,)), VocabPartition(12, 3)

    def run(table, ids=IDS, axis_name="tp", tokens=(), check_vma=True, partition=partition):
        mapped = jax.shard_map(
            lambda weight, ids: partial_lookup(weight, ids, partition, axis_name),
            mesh=mesh,
            in_specs=(P("tp", None), P(*tokens)),
            out_specs=P("tp"),
            check_vma=check_vma,
        )
        spec = NamedSharding(mesh, P(*tokens))
        return jax.jit(mapped)(jax.device_put(table, NamedSharding(mesh, P("tp", None))), jax.device_put(ids, spec))

    table = np.ones((12, 4), np.float32)
    with pytest.raises(ValueError, match="check_vma must be True in the shard_map around"):
        run(table, check_vma=False)
    with pytest.raises(ValueError, match="ids must be the same on all ranks of the axis 'tp', but they vary over it"):
        run(table, np.arange(6), tokens=("tp",))
    with pytest.raises(TypeError, match="axis_name must be a string, the name of one mesh axis, got \\('tp',\\)"):
        run(table, axis_name=("tp",))
    with pytest.raises(ValueError, match="must fit JAX's int32 indices"):
        run(table, partition=VocabPartition(3 * 2**31, 3))
    with pytest.raises((TypeError, ValueError), match="int8"):
        run(table.astype(np.int8))


def test_forward_mode_skips_padding_idx_with_checked_ids_too(mesh_of):
    emb = ParallelVocabEmbedding(12, 4, mesh_of((3,)), padding_idx=5, reduction="all_reduce", invalid_ids="error")
    plain = ParallelVocabEmbedding(12, 4, emb.mesh, padding_idx=5, reduction="all_reduce")
    ids, ones = jnp.asarray([[0, 5, 4]]), jax.tree.map(jnp.ones_like, emb)

    def derivatives(layer, direction):
        loss = lambda layer: (layer(ids) ** 3).sum()  # noqa: E731
        tangent = jax.jvp(lambda layer: layer(ids), (layer,), (direction,))[1]
        return tangent, jax.jvp(jax.grad(loss), (layer,), (direction,))[1].weight

    checked = jax.jit(jax.experimental.checkify.checkify(derivatives))
    error, found = checked(emb, ones)
    assert error.get() is None
    for each, expected in zip(found, jax.jit(derivatives)(plain, jax.tree.map(jnp.ones_like, plain)), strict=True):
        np.testing.assert_array_equal(each, expected)
