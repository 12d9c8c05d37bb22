"""The embedding itself, over device meshes: every reduction by every exchange, against the unsharded lookup."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import assert_is_right, assert_same_bits, backward, collectives, compiled, make_mesh, on

from jax_impl import ParallelVocabEmbedding, reduced_lookup
from shared import VocabPartition
from shared.proof.generate import zipf_ids
from shared.proof.oracle import partial_lookup

# all_reduce has only the dense form.
MODES = [("all_reduce", "dense"), ("reduce_scatter", "dense"), ("reduce_scatter", "routed")]


def table_of(vocab_size=48, emb_size=6, dtype=np.float32):
    table = np.random.default_rng(vocab_size).standard_normal((vocab_size, emb_size)).astype(dtype)
    table[1], table[vocab_size // 2], table[-1] = np.nan, -0.0, -np.inf
    return table


def layer_on(mesh, table, reduction, exchange, **options):
    options = {"dtype": table.dtype, "reduction": reduction, "exchange": exchange, **options}
    return ParallelVocabEmbedding(*table.shape, mesh, **options).with_weight(table)


@pytest.mark.parametrize(
    ("kind", "world_size", "dtype", "jit"),
    [
        ("Auto", 8, ml_dtypes.bfloat16, False),
        slower("Auto", 1, np.float32, True),
        slower("Auto", 4, np.float64, True),
        slower("Explicit", 3, np.float16, False),
    ],
)
def test_every_exchange_gives_the_bits_of_the_unsharded_lookup(mesh_of, world_size, dtype, jit):
    ids = zipf_ids((2, 24), VocabPartition(48, world_size), 0)
    with jax.enable_x64(dtype == np.float64):
        for mode in MODES:
            assert_is_right(layer_on(mesh_of((world_size,)), table_of(dtype=dtype), *mode), ids.clip(-1, 48), jit)


@pytest.mark.parametrize("mode", [("reduce_scatter", "routed"), *map(slower, MODES[:2])])
def test_lopsided_ids(mode):
    """Of 4 ranks with 16 rows, for chunks of 16 tokens: routed while one rank owns at most 8 of them, and then dense."""
    emb = layer_on(make_mesh(), table_of(64, 5), *mode)
    lopsided = [
        np.zeros(64),
        np.full(64, 63),
        np.arange(64) % 3,
        np.arange(12, 28).repeat(4),
        np.full(64, -1),
        np.array([5, 64, -7, -(2**31), 2**31 - 1] + [99] * 59),
        np.arange(64) // 5,
        *[np.tile([*range(owned), *[50] * (16 - owned)], 4) for owned in (7, 8, 9, 16)],
    ]
    for ids in lopsided:
        assert_is_right(emb, ids.astype(np.int32).reshape(1, 64))


@pytest.mark.parametrize("mode", [MODES[2], slower(MODES[0])])
def test_no_tokens(mesh_of, mode):
    mesh, ids = mesh_of((4,)), np.empty((3, 0), np.int64)
    emb = layer_on(mesh, table_of(), *mode)
    output = emb(ids)
    assert output.shape == (3, 0, 6)
    spec = P(None, "tp") if mode[0] == "reduce_scatter" else P()
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert not np.asarray(backward(emb, ids, output)).any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1:])
def test_the_sequence_may_be_any_dimension(mode):
    mesh = make_mesh()
    emb = layer_on(mesh, table_of(), *mode, seq_dim=0, padding_idx=0)
    output = assert_is_right(emb, zipf_ids((8, 4, 2), VocabPartition(48, 4), 1).clip(-1, 48))
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("tp")), 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "mode", "output", "dtype"),
    [
        (("dp", "sp"), MODES[0], P("dp", "sp"), np.float32),
        (("dp",), MODES[2], P("dp", "tp"), np.float32),
        ((None, ("sp", "dp")), MODES[1], P(None, ("sp", "dp", "tp")), ml_dtypes.bfloat16),
    ],
)
def test_ids_split_over_further_axes(mesh_of, rng, spec, mode, output, dtype):
    mesh = mesh_of((2, 2, 2), ("dp", "sp", "tp"))
    ids = on(mesh, rng.integers(-2, 50, (4, 16)).astype(np.int32), *spec)
    found = assert_is_right(layer_on(mesh, table_of(dtype=dtype), *mode), ids, jit=False)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, output), 3)


@pytest.mark.parametrize(
    ("kind", "shape", "mode", "dtype"),
    [
        ("Auto", (2, 4), MODES[0], ml_dtypes.bfloat16),
        ("Auto", (2, 4), MODES[2], np.float32),
        ("Explicit", (2, 4), MODES[1], np.float16),
        ("Auto", (4, 1), MODES[0], np.float32),
        ("Auto", (4, 1), MODES[1], ml_dtypes.bfloat16),
        slower("Explicit", (2, 4), MODES[0], np.float32),
        slower("Explicit", (4, 1), MODES[0], ml_dtypes.bfloat16),
    ],
)
def test_inside_jit_on_a_mesh_with_data(mesh_of, rng, shape, mode, dtype):
    """The split of the ids is not known on an Auto mesh."""
    mesh = mesh_of(shape, ("dp", "tp"))
    emb = layer_on(mesh, table_of(dtype=dtype), *mode, padding_idx=3)
    assert_is_right(emb, on(mesh, rng.integers(-2, 50, (4, 16)).astype(np.int32), "dp"))


def call(emb, ids):
    return emb(ids)


@pytest.mark.parametrize(
    ("reduction", "exchange", "dtype", "forward", "gradient"),
    [
        ("all_reduce", "dense", ml_dtypes.bfloat16, {"all-reduce": 1}, {}),
        ("all_reduce", "routed", np.float32, {"all-reduce": 1}, {}),
        ("reduce_scatter", "auto", np.float32, {"reduce-scatter": 1}, {"all-gather": 1}),
        ("reduce_scatter", "dense", ml_dtypes.bfloat16, {"reduce-scatter": 1}, {"all-gather": 1}),
        # Each way that a batch may take is in the program once; a run goes one of them.
        slower(
            *("reduce_scatter", "routed", np.float32),
            *({"all-to-all": 1, "reduce-scatter": 1}, {"all-to-all": 1, "all-gather": 1}),
        ),
        # Sums of 16-bit gradients are float32, and would be as many bytes.
        slower(
            *("reduce_scatter", "routed", ml_dtypes.bfloat16),
            *({"all-to-all": 1, "reduce-scatter": 1}, {"all-gather": 1}),
        ),
    ],
)
def test_collectives(mesh_of, reduction, exchange, dtype, forward, gradient):
    mesh = mesh_of((4,))
    emb, ids = layer_on(mesh, table_of(dtype=dtype), reduction, exchange), on(mesh, np.arange(64, dtype=np.int32)[None])
    program = compiled(call, emb, ids)
    assert collectives(program) == forward
    assert collectives(compiled(backward, emb, ids, program(emb, ids))) == gradient


def test_collectives_with_data_ranks(mesh_of):
    """The data ranks' gradients are added up, once; over the ranks of the table nothing is sent for all_reduce."""
    mesh = mesh_of((2, 4), ("dp", "tp"))
    ids = on(mesh, np.arange(64, dtype=np.int32).reshape(4, 16), "dp")
    emb = layer_on(mesh, table_of(4096), "all_reduce", "dense")
    program = compiled(call, emb, ids)
    assert collectives(program) == {"all-reduce": 1}
    found = compiled(backward, emb, ids, program(emb, ids)).as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", found)  # the compiler would gather the tokens
    groups = set(re.findall(r"all-reduce[^\n]*replica_groups=(.+?),? (?:use|chan|metadata|dim)", found))
    # Devices 0 to 3 hold the table for one data rank, 4 to 7 for the other: only i and i + 4 talk.
    assert groups
    assert groups <= {"{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "mesh['dp'=2,'tp'=4] {'dp'}"}, groups


def test_sequence_parallel_output_needs_one_collective(mesh_of):
    mesh = mesh_of((4,))
    ids, emb = on(mesh, np.arange(64, dtype=np.int32)[None]), layer_on(mesh, table_of(), "reduce_scatter", "dense")
    norm = compiled(lambda emb, ids: emb(ids) * 2 + jnp.mean(emb(ids), axis=-1, keepdims=True), emb, ids)
    assert set(collectives(norm)) == {"reduce-scatter"}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["dense", "routed"])
def test_vmap(rng, exchange):
    table, ids = rng.standard_normal((48, 6)).astype(np.float32), np.arange(32).reshape(2, 16) * 5 % 48
    emb, stacked = layer_on(make_mesh(), table, "reduce_scatter", exchange), jnp.stack([ids, ids[::-1]])

    @jax.jit
    def rows_and_gradient(emb):
        return jax.vmap(emb)(stacked), jax.grad(lambda emb: jax.vmap(emb)(stacked).sum())(emb).weight

    rows, gradient = rows_and_gradient(emb)
    np.testing.assert_array_equal(rows, table[stacked])
    np.testing.assert_array_equal(np.asarray(gradient)[:, 0], 2 * np.bincount(ids.ravel(), minlength=48))


@pytest.mark.slow
def test_inside_a_shard_map_of_ones_own(mesh_of):
    mesh, partition, table = mesh_of((4,)), VocabPartition(48, 4), table_of()
    weight, ids = on(mesh, table, "tp"), on(mesh, np.arange(48, dtype=np.int32).reshape(2, 24))
    for reduction, exchange in MODES:
        lookup = functools.partial(reduced_lookup, partition=partition, reduction=reduction, exchange=exchange)
        output = P() if reduction == "all_reduce" else P(None, "tp")
        mapped = jax.jit(jax.shard_map(lookup, mesh=mesh, in_specs=(P("tp", None), P()), out_specs=output))
        assert_same_bits(mapped(weight, ids), table[np.asarray(ids)], (reduction, exchange))
    ids = on(mesh, ids, None, "tp")
    varying = jax.shard_map(lookup, mesh=mesh, in_specs=(P("tp", None), P(None, "tp")), out_specs=P("tp"))
    with pytest.raises(ValueError, match="ids must be the same on all ranks of the axis 'tp', but they vary over it"):
        varying(weight, ids)


def test_bad_arguments_are_refused():
    layer = functools.partial(layer_on, make_mesh(), table_of())
    emb, ids = layer("reduce_scatter", "dense"), np.arange(10).reshape(2, 5)
    indivisible = r"ids of shape \(2, 5\) have 5 positions along dimension 1, which leaves 1"
    for lookup in (emb, jax.jit(emb)):
        with pytest.raises(ValueError, match=indivisible):
            lookup(ids)
        with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
            lookup(np.int32(3))
    with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
        layer("reduce_scatter", "dense", seq_dim=2)(ids)
    with pytest.raises(TypeError, match="seq_dim must be an integer"):
        layer("reduce_scatter", "dense", seq_dim=1.0)
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'dense' or 'routed', got 'p2p'"):
        layer("all_reduce", "p2p")
    with pytest.raises(IndexError, match=r"ids\[0, 1\] = 48 is outside the vocabulary"):
        layer("all_reduce", "dense", invalid_ids="error")(np.array([[3, 48]]))


def test_invalid_ids_inside_jit():
    emb = layer_on(make_mesh(), table_of(), "reduce_scatter", "routed", invalid_ids="error")
    checked, ids = jax.jit(checkify.checkify(call)), np.arange(8).reshape(1, 8)
    error, output = checked(emb, ids)
    assert error.get() is None
    np.testing.assert_array_equal(output, np.asarray(emb.weight)[ids])
    ids[0, 3] = 99
    assert "ids[0, 3] = 99 is outside the vocabulary" in checked(emb, ids)[0].get()


@pytest.mark.parametrize("mode", [("none", "dense"), ("all_reduce", "dense"), ("reduce_scatter", "routed")])
def test_every_16_bit_number_survives(mode):
    """All 65536 of them: NaNs of every payload, subnormal numbers, both zeros."""
    table = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 64)
    ids = np.arange(1024, dtype=np.int32).reshape(1, 1024)[:, ::-1]
    emb = layer_on(make_mesh(), table, *mode)
    partials = [partial_lookup(rows, ids, emb.partition, rank) for rank, rows in enumerate(np.split(table, 4))]
    assert_same_bits(emb(ids), np.stack(partials) if mode[0] == "none" else table[ids], mode)
