"""Every reduction by every exchange, over device meshes, against the unsharded lookup."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import assert_is_right, assert_same_bits, backward, make_mesh, on

from jax_impl import ParallelVocabEmbedding, partial_lookup, reduced_lookup
from shared import VocabPartition
from shared.proof import oracle
from shared.proof.generate import exact_gradient, zipf_ids

# all_reduce has only the dense form.
MODES = [
    ("all_reduce", "dense"),
    *((reduction, exchange) for reduction in ("reduce_scatter", "all_to_all") for exchange in ("dense", "routed")),
]
ALL_REDUCE, SCATTER, SCATTER_ROUTED, OWN, OWN_ROUTED = MODES
PARTIAL = ("none", "dense")


def table_of(vocab_size=48, emb_size=6, dtype=np.float32):
    table = np.random.default_rng(vocab_size).standard_normal((vocab_size, emb_size)).astype(dtype)
    table[1], table[vocab_size // 2], table[-1] = np.nan, -0.0, -np.inf
    return table


def layer_on(mesh, table, reduction, exchange, **options):
    return ParallelVocabEmbedding.from_embedding(table, mesh, reduction=reduction, exchange=exchange, **options)


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
    ids = zipf_ids((24, 24), VocabPartition(48, world_size), 0)
    with jax.enable_x64(dtype == np.float64):
        for mode in MODES:
            assert_is_right(layer_on(mesh_of((world_size,)), table_of(dtype=dtype), *mode), ids.clip(-1, 48), jit)


@pytest.mark.parametrize("mode", [SCATTER_ROUTED, *map(slower, MODES[:2])])
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


@pytest.mark.parametrize("mode", [PARTIAL, ALL_REDUCE, SCATTER_ROUTED, OWN_ROUTED])
def test_no_tokens(mesh_of, mode):
    mesh, ids = mesh_of((4,)), np.empty((4, 0), np.int64)
    emb = layer_on(mesh, table_of(), *mode, invalid_ids="error")
    output = emb(ids)
    assert output.shape == ((4, 4, 0, 6) if mode[0] == "none" else (4, 0, 6))
    spec = {"all_reduce": P(), "reduce_scatter": P(None, "tp")}.get(mode[0], P("tp"))
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, spec), output.ndim)
    error, in_jit = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))(emb, ids)
    assert (error.get(), in_jit.shape) == (None, output.shape)
    assert not np.asarray(backward(emb, ids, output)).any()


@pytest.mark.parametrize(
    ("kind", "shape", "spec", "mode", "dtype", "output"),
    [
        ("Auto", (2, 2, 2), P("dp", "sp"), PARTIAL, ml_dtypes.bfloat16, P("tp", "dp", "sp")),
        ("Auto", (2, 4), P("tp"), PARTIAL, np.float32, P("tp")),
        ("Auto", (2, 4), P("dp"), ALL_REDUCE, ml_dtypes.bfloat16, P("dp")),
        ("Auto", (2, 4), P("dp"), SCATTER_ROUTED, np.float32, P("dp", "tp")),
        ("Auto", (2, 4), P(("dp", "tp")), OWN_ROUTED, ml_dtypes.bfloat16, P(("dp", "tp"))),
        ("Auto", (4, 1), P("dp"), ALL_REDUCE, np.float32, P("dp")),
        ("Auto", (4, 1), P("dp"), SCATTER, ml_dtypes.bfloat16, P("dp")),
        ("Explicit", (2, 2, 2), P("dp"), PARTIAL, np.float32, P("tp", "dp")),
        ("Explicit", (2, 4), P("dp"), SCATTER, np.float16, P("dp", "tp")),
        slower("Auto", (2, 2), P("tp", "dp"), OWN_ROUTED, ml_dtypes.bfloat16, P("tp", "dp")),
        slower("Auto", (2, 2, 2), P(None, ("sp", "dp")), SCATTER, ml_dtypes.bfloat16, P(None, ("sp", "dp", "tp"))),
        slower("Explicit", (2, 2, 2), P("dp", "sp"), ALL_REDUCE, np.float32, P("dp", "sp")),
        slower("Explicit", (2, 4), P(("dp", "tp")), OWN, np.float32, P(("dp", "tp"))),
        slower("Explicit", (4, 1), P("dp"), ALL_REDUCE, ml_dtypes.bfloat16, P("dp")),
    ],
)
def test_ids_split_over_further_axes(mesh_of, rng, shape, spec, mode, dtype, output):
    """Outside jit the split is known. Inside, on an Auto mesh, it is not."""
    mesh = mesh_of(shape, ("dp", "sp", "tp") if len(shape) == 3 else ("dp", "tp"))
    emb = layer_on(mesh, table_of(dtype=dtype), *mode, padding_idx=3)
    ids = on(mesh, rng.integers(-2, 50, (8, 16)).astype(np.int32), *spec)
    assert_is_right(emb, ids)
    found = assert_is_right(emb, ids, jit=False)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, output), found.ndim)


def test_own_ids_too_few_for_a_further_axis(mesh_of):
    """Inside jit no axis is guessed to split them that does not divide what a rank has."""
    assert_is_right(layer_on(mesh_of((2, 4), ("dp", "tp")), table_of(), *OWN), np.arange(12).reshape(4, 3))


def summed_lookup(weight, ids, partition, padding_idx):
    return jax.lax.psum(partial_lookup(weight, ids, partition, padding_idx=padding_idx), "tp")


@pytest.mark.parametrize(
    ("mode", "tokens", "output"),
    [
        (PARTIAL, P("dp"), P("dp")),
        (SCATTER_ROUTED, P("dp"), P("dp", "tp")),
        (OWN, P(("dp", "tp")), P(("dp", "tp"))),
        slower(ALL_REDUCE, P("dp"), P("dp")),
        slower(SCATTER, P("dp"), P("dp", "tp")),
        slower(OWN_ROUTED, P(("dp", "tp")), P(("dp", "tp"))),
    ],
)
def test_inside_a_shard_map_of_ones_own(mode, tokens, output):
    partition, table, ids = VocabPartition(48, 4), table_of(), np.arange(192, dtype=np.int32).reshape(8, 24) % 50
    upstream = exact_gradient(ids, 6, table.dtype, 0)
    lookup = (
        functools.partial(reduced_lookup, reduction=mode[0], exchange=mode[1]) if mode != PARTIAL else summed_lookup
    )

    def step(weight, ids, upstream):
        found, pull_back = jax.vjp(lambda weight: lookup(weight, ids, partition, padding_idx=5), weight)
        return found, pull_back(upstream)[0]

    def run(tokens):
        specs = {"in_specs": (P("tp"), tokens, output), "out_specs": (output, P("tp"))}
        mapped = jax.shard_map(step, mesh=make_mesh((2, 4), ("dp", "tp")), **specs)
        return jax.jit(mapped)(table, ids, upstream)

    whole = VocabPartition(48, 1)
    found, gradient = run(tokens)
    np.testing.assert_array_equal(found, oracle.partial_lookup(table, ids, whole, 0), strict=True)
    assert_same_bits(gradient, oracle.weight_grad(upstream, ids, whole, 0, 5))
    if mode[0] != "all_to_all":
        with pytest.raises(ValueError, match="ids must be the same on all ranks of the axis 'tp', but they vary"):
            run(P("dp", "tp"))


def test_bad_arguments_are_refused():
    layer = functools.partial(layer_on, make_mesh(), table_of())
    emb, ids = layer("reduce_scatter", "dense"), np.arange(10).reshape(2, 5)
    indivisible = r"ids of shape \(2, 5\) have 5 positions along dimension 1, which leaves 1"
    for lookup in (emb, jax.jit(emb)):
        with pytest.raises(ValueError, match=indivisible):
            lookup(ids)
        with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
            lookup(np.int32(3))
    for ids in (np.int32(3), np.arange(3), np.zeros((6, 4), int)):
        with pytest.raises(
            ValueError, match="the first dimension of the ids must be divisible by the 4 ranks along tp"
        ):
            layer("all_to_all", "dense")(ids)
    with pytest.raises(TypeError, match="seq_dim must be an integer"):
        layer("reduce_scatter", "dense", seq_dim=1.0)
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'dense' or 'routed', got 'p2p'"):
        layer("all_reduce", "p2p")


@pytest.mark.parametrize("mode", [PARTIAL, ALL_REDUCE, SCATTER_ROUTED])
def test_every_16_bit_number_survives(mode):
    """All 65536 of them: NaNs of every payload, subnormal numbers, both zeros."""
    table = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(-1, 64)
    ids = np.arange(1024, dtype=np.int32).reshape(1, 1024)[:, ::-1]
    emb = layer_on(make_mesh(), table, *mode)
    partials = [oracle.partial_lookup(rows, ids, emb.partition, rank) for rank, rows in enumerate(np.split(table, 4))]
    assert_same_bits(emb(ids), np.stack(partials) if mode[0] == "none" else table[ids], mode)
