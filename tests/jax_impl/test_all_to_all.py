"""Each rank its own ids, on real meshes: values and gradients of the concatenated batch, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import assert_is_right, assert_same_bits, collectives, compiled, make_mesh, on

from jax_impl import ParallelVocabEmbedding, reduced_lookup
from shared import VocabPartition
from shared.proof.generate import exact_gradient
from shared.proof.oracle import partial_lookup, weight_grad

VOCAB, EMB = 21, 6


def case(shape, dtype=np.float32):
    """A table and ids."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCAB, EMB)).astype(dtype)
    table[3], table[9], table[20] = np.nan, -0.0, np.inf
    return table, rng.integers(-2, VOCAB + 3, shape).astype(np.int32)


def layer(mesh, table, **options):
    options = {"reduction": "all_to_all", "padded_vocab_size": "even", **options}
    return ParallelVocabEmbedding.from_embedding(table, mesh, **options)


@pytest.mark.parametrize(
    ("mesh", "kind", "shape", "split", "exchange", "dtype"),
    [
        ((1,), "Auto", (5,), P("tp"), "routed", np.float32),
        ((4,), "Auto", (8, 3), P("tp"), "dense", ml_dtypes.bfloat16),
        ((8,), "Explicit", (16,), P("tp"), "routed", np.float32),
        ((2, 4), "Auto", (8, 2, 3), P(("dp", "tp")), "routed", ml_dtypes.bfloat16),
        ((2, 4), "Explicit", (16, 3), P(("dp", "tp")), "dense", np.float32),
        ((2, 2), "Auto", (4, 6), P("tp", "dp"), "routed", ml_dtypes.bfloat16),
    ],
)
def test_rows_and_gradients_of_the_whole_batch(mesh_of, mesh, shape, split, exchange, dtype):
    mesh, (table, ids) = mesh_of(mesh, ("dp", "tp")[-len(mesh) :]), case(shape, dtype)
    emb, ids = layer(mesh, table, exchange=exchange, padding_idx=5), on(mesh, ids, *split)
    assert_is_right(emb, ids)
    entry = assert_is_right(emb, ids, jit=False).sharding.spec[0]
    assert "tp" in (entry if isinstance(entry, tuple) else (entry,))


def test_inside_a_shard_map_of_ones_own():
    (table, ids), partition = case((8, 3)), VocabPartition(VOCAB, 4, "even")
    table, upstream = np.pad(table, ((0, 3), (0, 0))), exact_gradient(ids, EMB, table.dtype, 0)
    lookup = functools.partial(reduced_lookup, partition=partition, reduction="all_to_all")

    def step(weight, ids, upstream):
        output, pull_back = jax.vjp(lambda weight: lookup(weight, ids), weight)
        return output, pull_back(upstream)[0]

    mapped = jax.shard_map(step, mesh=make_mesh(), in_specs=(P("tp"), P("tp"), P("tp")), out_specs=(P("tp"), P("tp")))
    output, gradient = jax.jit(mapped)(table, ids, upstream)
    whole = VocabPartition(VOCAB, 1, 24)
    assert_same_bits(output, partial_lookup(table, ids, whole, 0))
    assert_same_bits(gradient, weight_grad(upstream, ids, whole, 0))


def test_ids_are_gathered_once_and_rows_take_one_collective():
    mesh, (table, ids) = make_mesh(), case((8,))
    used = collectives(compiled(lambda emb, ids: emb(ids), layer(mesh, table, exchange="dense"), on(mesh, ids, "tp")))
    assert used.pop("all-gather") == 1
    assert [*used.values()] == [1]


def test_transforms_and_empty_batch():
    mesh, (table, ids) = make_mesh(), case((8, 3))
    emb = layer(mesh, np.nan_to_num(table, posinf=1))
    counts = np.bincount(ids[(ids >= 0) & (ids < VOCAB)], minlength=VOCAB)

    @jax.jit
    def derivatives(weight):
        square = lambda weight: (emb.with_weight(weight)(ids) ** 2).sum()  # noqa: E731
        second = jax.grad(lambda weight: jax.grad(square)(weight).sum())(weight)
        return second, jax.vmap(emb.with_weight(weight))(jnp.stack([ids, ids[::-1]]))

    second, rows = derivatives(emb.weight)
    np.testing.assert_array_equal(np.asarray(second)[:VOCAB, 0], 2 * counts)
    np.testing.assert_array_equal(rows[1], np.asarray(emb(ids[::-1])))
    for run in (emb, jax.jit(emb)):
        assert run(np.zeros((0, 3), np.int32)).shape == (0, 3, EMB)
    with pytest.raises(IndexError, match="99"):
        layer(mesh, table, invalid_ids="error")(np.full(4, 99))


@pytest.mark.parametrize("shape", [(), (3,), (6, 4)])
def test_batch_that_cannot_be_split_is_refused(shape):
    with pytest.raises(ValueError, match=r"the first dimension of the ids must be divisible by the 4 ranks along tp"):
        layer(make_mesh(), case((1,))[0])(np.zeros(shape, np.int32))
