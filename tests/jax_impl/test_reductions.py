"""The embedding itself, over device meshes: every reduction by every exchange, against the unsharded lookup."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import pairwise, slower
from meshes import assert_same_bits, backward, collectives, make_mesh, on

from jax_impl import ParallelVocabEmbedding, reduced_lookup
from shared import VocabPartition
from shared.proof.generate import exact_gradient, zipf_ids
from shared.proof.oracle import partial_lookup, weight_grad

REDUCTIONS, EXCHANGES = ["all_reduce", "reduce_scatter"], ["dense", "routed"]


def table_of(vocab_size, emb_size, dtype):
    table = np.random.default_rng(vocab_size).standard_normal((vocab_size, emb_size)).astype(dtype)
    if vocab_size > 4:
        table[1], table[vocab_size // 2], table[-1] = np.nan, -0.0, -np.inf
    return table


def layer_on(mesh, table, reduction, exchange, **options):
    emb = ParallelVocabEmbedding(
        *table.shape, mesh, dtype=table.dtype, reduction=reduction, exchange=exchange, **options
    )
    return emb.with_weight(table)


def check_case(mesh, ids, vocab_size, emb_size, dtype, exchanges=EXCHANGES, spec=(), **options):
    table = table_of(vocab_size, emb_size, dtype)
    whole = VocabPartition(vocab_size, 1)
    expected = partial_lookup(table, ids, whole, 0)
    upstream = exact_gradient(ids, emb_size, np.dtype(dtype), 0)
    gradient = weight_grad(upstream, ids, whole, 0, options.get("padding_idx"))
    for reduction, exchange in itertools.product(REDUCTIONS, exchanges):
        emb = layer_on(mesh, table, reduction, exchange, **options)
        given = on(mesh, ids.astype(np.int32), *spec) if spec else ids
        output = emb(given)
        note = reduction, exchange, ids.shape
        assert_same_bits(output, expected, note)
        found = backward(emb, given, jax.device_put(upstream, output.sharding))
        assert_same_bits(found, gradient, note)


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [
        slower(1, np.float32),
        slower(3, np.float16),
        (8, ml_dtypes.bfloat16),
    ],
)
def test_every_exchange_gives_the_bits_of_the_unsharded_lookup(world_size, dtype):
    ids = zipf_ids((2, 24), VocabPartition(48, world_size), 0)
    check_case(make_mesh((world_size,)), ids, 48, 5 if world_size == 3 else 6, dtype)


@pytest.mark.slow
def test_on_an_explicit_mesh():
    mesh = make_mesh(kind="Explicit")
    with jax.set_mesh(mesh):
        check_case(mesh, zipf_ids((2, 24), VocabPartition(48, 4), 0), 48, 6, np.float32)


@pytest.mark.slow
def test_float64(x64):
    check_case(make_mesh(), zipf_ids((2, 16), VocabPartition(48, 4), 0), 48, 6, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_lopsided_ids(dtype):
    """One mesh and one shape, so that one program a mode runs them all."""
    lopsided = {
        "one id": np.zeros(16),
        "all on the last rank": np.full(16, 11),
        "all on the first ranks": np.arange(16) % 3,
        "some ranks own none": np.arange(3, 7).repeat(4),
        "all invalid": np.full(16, -1),
        "one valid": np.array([5, 12, -7, -(2**31), 2**31 - 1] + [99] * 11),
        "many duplicates": np.arange(16) // 5,
    }
    for ids in lopsided.values():
        check_case(make_mesh(), ids.astype(np.int32).reshape(2, 8), 12, 5, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ids",
    [
        np.empty((3, 0), np.int64),
        np.arange(16, dtype=np.uint8).reshape(2, 2, 4),
        np.array([[5, 12, -7, 2**40]]),
    ],
    ids=["no tokens", "three dimensions of bytes", "64 bits"],
)
def test_ids_of_other_shapes_and_dtypes(ids):
    check_case(make_mesh(), ids, 12, 4, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("owned", [1, 127, 128, 129, 250])
def test_either_side_of_the_capacity(owned):
    """From ids that one rank owns a few of to ids that it owns all of: routed up to half a chunk, and then dense."""
    mesh, chunk = make_mesh(), 256
    ids = np.tile(np.concatenate([np.arange(owned - 1), np.full(chunk - owned + 1, 1500)]), (1, 4))
    check_case(mesh, ids, 2048, 4, np.float32, ["routed"])


@pytest.mark.slow
@pytest.mark.parametrize("seq_dim", [0])
def test_the_sequence_may_be_any_dimension(seq_dim):
    ids = zipf_ids((8, 4, 2), VocabPartition(64, 4), 1)
    mesh = make_mesh()
    check_case(mesh, ids, 64, 4, np.float32, seq_dim=seq_dim)
    emb = layer_on(mesh, table_of(64, 4, np.float32), "reduce_scatter", "routed", seq_dim=seq_dim)
    spec = [None, None, None]
    spec[seq_dim] = "tp"
    assert emb(ids).sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), 4)


@pytest.mark.slow
def test_padding_idx_gets_no_gradient():
    check_case(make_mesh(), zipf_ids((4, 16), VocabPartition(48, 4), 2), 48, 4, np.float32, padding_idx=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (("dp",), np.float32),
        ((None, "dp"), ml_dtypes.bfloat16),
        (("dp", "sp"), np.float32),
        ((None, ("sp", "dp")), np.float32),
    ],
)
def test_ids_split_over_further_axes(mesh_of, spec, dtype):
    mesh = mesh_of((2, 2, 2), ("dp", "sp", "tp"))
    ids = np.random.default_rng(0).integers(-2, 50, (4, 16))
    check_case(mesh, ids, 48, 6, dtype, spec=spec)
    emb = layer_on(mesh, table_of(48, 6, dtype), "reduce_scatter", "routed")
    output = emb(on(mesh, ids.astype(np.int32), *spec))
    first = spec[0]
    second = (*((spec[1],) if isinstance(spec[1], str) else spec[1]), "tp") if len(spec) > 1 else "tp"
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P(first, second)), 3)


@pytest.mark.parametrize(
    ("kind", "reduction", "exchange"),
    pairwise(
        [
            ("Auto", "all_reduce", "dense"),
            ("Auto", "reduce_scatter", "routed"),
            ("Explicit", "reduce_scatter", "dense"),
        ],
        ["Auto", "Explicit"],
        REDUCTIONS,
        EXCHANGES,
    ),
)
def test_inside_jit_on_a_mesh_with_data(mesh_of, reduction, exchange):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    table, ids = table_of(48, 6, np.float32), np.random.default_rng(0).integers(-2, 50, (4, 16)).astype(np.int32)
    emb = layer_on(mesh, table, reduction, exchange)
    split = on(mesh, ids, "dp")
    output = jax.jit(lambda emb, ids: emb(ids))(emb, split)
    assert_same_bits(output, partial_lookup(table, ids, VocabPartition(48, 1), 0), exchange)
    upstream = exact_gradient(ids, 6, np.dtype(np.float32), 0)
    gradient = jax.jit(backward)(emb, split, jax.device_put(upstream, output.sharding))
    assert_same_bits(gradient, weight_grad(upstream, ids, VocabPartition(48, 1), 0), exchange)


def test_collectives_of_the_dense_exchange(mesh_of):
    mesh = mesh_of((4,))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16))
    forward = lambda emb, ids: emb(ids)  # noqa: E731
    for dtype in (np.float32, ml_dtypes.bfloat16):
        emb = layer_on(mesh, table_of(48, 6, dtype), "all_reduce", "dense")
        assert collectives(forward, emb, ids) == {"all-reduce": 1}
        assert collectives(backward, emb, ids, emb(ids)) == {}
        emb = layer_on(mesh, table_of(48, 6, dtype), "reduce_scatter", "dense")
        assert collectives(forward, emb, ids) == {"reduce-scatter": 1}
        assert collectives(backward, emb, ids, emb(ids)) == {"all-gather": 1}


@pytest.mark.slow
def test_collectives_of_the_routed_exchange(mesh_of):
    """Each way that a batch may take is in the program once; a run goes one of them."""
    mesh = mesh_of((4,))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16))
    forward = lambda emb, ids: emb(ids)  # noqa: E731
    emb = layer_on(mesh, table_of(48, 6, np.float32), "reduce_scatter", "routed")
    assert collectives(forward, emb, ids) == {"all-to-all": 1, "reduce-scatter": 1}
    assert collectives(backward, emb, ids, emb(ids)) == {"all-to-all": 1, "all-gather": 1}
    # Sums of 16-bit gradients are float32, and would be as many bytes.
    emb = layer_on(mesh, table_of(48, 6, ml_dtypes.bfloat16), "reduce_scatter", "routed")
    assert collectives(backward, emb, ids, emb(ids)) == {"all-gather": 1}
    emb = layer_on(mesh, table_of(48, 6, np.float32), "all_reduce", "routed")
    assert collectives(forward, emb, ids) == {"all-reduce": 1}
    assert collectives(backward, emb, ids, emb(ids)) == {}


def test_collectives_with_data_ranks(mesh_of):
    """The data ranks' gradients are added up, once; over the ranks of the table nothing is sent for all_reduce."""
    mesh = mesh_of((2, 4), ("dp", "tp"))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16), "dp")
    forward = lambda emb, ids: emb(ids)  # noqa: E731
    emb = layer_on(mesh, table_of(4096, 6, np.float32), "all_reduce", "dense")
    assert collectives(forward, emb, ids) == {"all-reduce": 1}
    found = jax.jit(backward).lower(emb, ids, emb(ids)).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", found)  # the compiler would gather the tokens
    groups = set(re.findall(r"all-reduce[^\n]*replica_groups=(.+?),? (?:use|chan|metadata|dim)", found))
    # Devices 0 to 3 hold the table for one data rank, 4 to 7 for the other: only i and i + 4 talk.
    assert groups
    assert groups <= {"{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "mesh['dp'=2,'tp'=4] {'dp'}"}, groups


def test_sequence_parallel_output_needs_one_collective(mesh_of):
    mesh = mesh_of((4,))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16))
    emb = layer_on(mesh, table_of(48, 6, np.float32), "reduce_scatter", "dense")
    norm = lambda emb, ids: emb(ids) * 2 + jnp.mean(emb(ids), axis=-1, keepdims=True)  # noqa: E731
    assert set(collectives(norm, emb, ids)) == {"reduce-scatter"}


@pytest.mark.slow
def test_forward_mode_second_derivatives_and_vmap():
    mesh = make_mesh()
    table = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)
    ids = np.arange(32).reshape(2, 16) * 5 % 48
    for reduction, exchange in itertools.product(REDUCTIONS, EXCHANGES):
        emb = layer_on(mesh, table, reduction, exchange)
        primal, tangent = jax.jvp(lambda emb: emb(ids), (emb,), (emb,))
        np.testing.assert_array_equal(tangent, primal)
        loss = lambda emb: (emb(ids) ** 3).sum()  # noqa: E731
        gradient, second = jax.jvp(jax.grad(loss), (emb,), (jax.tree.map(jnp.ones_like, emb),))
        counts = np.bincount(ids.ravel(), minlength=48)[:, None]
        np.testing.assert_allclose(gradient.weight, 3 * counts * table**2, rtol=1e-5)
        np.testing.assert_allclose(second.weight, 6 * counts * table, rtol=1e-5)
        stacked = jnp.stack([jnp.asarray(ids), jnp.asarray(ids)[::-1]])
        np.testing.assert_array_equal(jax.vmap(emb)(stacked), table[np.asarray(stacked)])
        gradient = jax.grad(lambda emb, stacked=stacked: jax.vmap(emb)(stacked).sum())(emb)
        np.testing.assert_array_equal(gradient.weight, np.broadcast_to(2 * counts, (48, 6)))


@pytest.mark.slow
def test_inside_a_shard_map_of_ones_own(mesh_of):
    mesh = mesh_of((4,))
    partition, table = VocabPartition(48, 4), table_of(48, 6, np.float32)
    weight, ids = on(mesh, table, "tp"), on(mesh, np.arange(48, dtype=np.int32).reshape(2, 24))
    for reduction, exchange in itertools.product(REDUCTIONS, EXCHANGES):
        lookup = functools.partial(reduced_lookup, partition=partition, reduction=reduction, exchange=exchange)
        output = P() if reduction == "all_reduce" else P(None, "tp")
        mapped = jax.jit(jax.shard_map(lookup, mesh=mesh, in_specs=(P("tp", None), P()), out_specs=output))
        assert_same_bits(mapped(weight, ids), table[np.asarray(ids)], (reduction, exchange))
    ids = on(mesh, ids, None, "tp")
    varying = jax.shard_map(lookup, mesh=mesh, in_specs=(P("tp", None), P(None, "tp")), out_specs=P("tp"))
    with pytest.raises(ValueError, match="ids must be the same on all ranks of the axis 'tp', but they vary over it"):
        varying(weight, ids)


def test_bad_arguments(mesh_of):
    mesh = mesh_of((4,))
    table, ids = table_of(48, 6, np.float32), np.arange(10).reshape(2, 5)
    emb = layer_on(mesh, table, "reduce_scatter", "dense")
    for call in (emb, jax.jit(emb)):
        with pytest.raises(
            ValueError, match=r"ids of shape \(2, 5\) have 5 positions along dimension 1, which leaves 1"
        ):
            call(ids)
        with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
            call(np.int32(3))
    with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
        layer_on(mesh, table, "reduce_scatter", "dense", seq_dim=2)(ids)
    with pytest.raises(TypeError, match="seq_dim must be an integer"):
        layer_on(mesh, table, "reduce_scatter", "dense", seq_dim=1.0)
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'dense' or 'routed', got 'p2p'"):
        layer_on(mesh, table, "all_reduce", "p2p")
    with pytest.raises(IndexError, match=r"ids\[0, 1\] = 48 is outside the vocabulary"):
        layer_on(mesh, table, "all_reduce", "dense", invalid_ids="error")(np.array([[3, 48]]))


@pytest.mark.parametrize(("reduction", "exchange"), pairwise([("reduce_scatter", "routed")], REDUCTIONS, EXCHANGES))
def test_invalid_ids_inside_jit(reduction, exchange):
    emb = layer_on(make_mesh(), table_of(48, 6, np.float32), reduction, exchange, invalid_ids="error")
    checked = jax.jit(jax.experimental.checkify.checkify(lambda emb, ids: emb(ids)))
    ids = np.arange(8).reshape(1, 8)
    error, output = checked(emb, ids)
    assert error.get() is None
    np.testing.assert_array_equal(output, np.asarray(emb.weight)[ids])
    ids[0, 3] = 99
    assert "ids[0, 3] = 99 is outside the vocabulary" in checked(emb, ids)[0].get()


def test_auto_is_dense(mesh_of):
    mesh = mesh_of((4,))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16))
    emb = layer_on(mesh, table_of(48, 6, np.float32), "reduce_scatter", "auto")
    assert collectives(lambda emb, ids: emb(ids), emb, ids) == {"reduce-scatter": 1}
    assert collectives(backward, emb, ids, emb(ids)) == {"all-gather": 1}


@pytest.mark.parametrize("reduction", ["reduce_scatter", slower("all_reduce")])
def test_a_tensor_axis_of_one_beside_data(mesh_of, reduction):
    """Under jit, where the split of the ids is not known on an Auto mesh."""
    mesh = mesh_of((4, 1), ("dp", "tp"))
    table, ids = table_of(48, 6, np.float32), np.arange(32, dtype=np.int32).reshape(4, 8)
    emb, split = layer_on(mesh, table, reduction, "dense"), on(mesh, ids, "dp")
    assert_same_bits(jax.jit(lambda emb, ids: emb(ids))(emb, split), table[ids], reduction)
    upstream = exact_gradient(ids, 6, np.dtype(np.float32), 0)
    gradient = jax.jit(backward)(emb, split, jax.device_put(upstream, emb(split).sharding))
    assert_same_bits(gradient, weight_grad(upstream, ids, VocabPartition(48, 1), 0), reduction)


@pytest.mark.parametrize(
    ("reduction", "exchange", "world_size"),
    pairwise([("all_reduce", "dense", 4), ("reduce_scatter", "routed", 4)], REDUCTIONS, EXCHANGES, [1, 4]),
)
def test_every_16_bit_number_survives(reduction, exchange, world_size):
    """All 65536 of them: NaNs of every payload, subnormal numbers, both zeros."""
    table = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 64)
    ids = np.arange(1024, dtype=np.int32).reshape(1, 1024)[:, ::-1]
    emb = layer_on(make_mesh((world_size,)), table, reduction, exchange)
    assert_same_bits(emb(ids), table[ids], exchange)
