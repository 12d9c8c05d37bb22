"""Each rank its own ids, on real meshes: values and gradients of the concatenated batch, bit for bit."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import pairwise

from jax_impl import ParallelVocabEmbedding, reduced_lookup
from shared import VocabPartition
from shared.proof.generate import exact_gradient
from shared.proof.oracle import weight_grad

VOCAB, EMB = 21, 6


def mesh_of(shape, kind=AxisType.Auto):
    names = ("dp", "tp")[-len(shape) :]
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=jax.devices()[: int(np.prod(shape))])


def case(shape, dtype=np.float32, padding_idx=None):
    """A table, ids, their rows, a gradient of the embedding, and the table's gradient."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCAB, EMB)).astype(dtype)
    table[3], table[9], table[20] = np.nan, -0.0, np.inf
    ids = rng.integers(-2, VOCAB + 3, shape)
    valid = (ids >= 0) & (ids < VOCAB)
    rows = np.where(valid[..., None], table[np.where(valid, ids, 0)], np.zeros(EMB, dtype))
    upstream = exact_gradient(ids, EMB, np.dtype(dtype), 0)
    gradient = weight_grad(upstream, ids, VocabPartition(VOCAB, 1), 0, padding_idx)
    return table, ids, rows, upstream, gradient


def assert_bits(found, expected):
    found = np.asarray(found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


BATCHES = [
    ((1,), AxisType.Auto, (5,), P("tp")),
    ((4,), AxisType.Auto, (8, 3), P("tp")),
    ((8,), AxisType.Explicit, (16,), P("tp")),
    ((2, 4), AxisType.Auto, (8, 2, 3), P(("dp", "tp"))),
    ((2, 4), AxisType.Explicit, (16, 3), P(("dp", "tp"))),
    ((2, 2), AxisType.Auto, (4, 6), P("tp", "dp")),
]


@pytest.mark.parametrize(
    ("batch", "exchange", "dtype"),
    pairwise(
        [
            (1, "dense", ml_dtypes.bfloat16),
            (2, "routed", np.float32),
            (3, "routed", ml_dtypes.bfloat16),
            (4, "dense", np.float32),
            (5, "routed", ml_dtypes.bfloat16),
        ],
        range(6),
        ["dense", "routed"],
        [np.float32, ml_dtypes.bfloat16],
    ),
)
def test_rows_and_gradients_of_the_whole_batch(batch, exchange, dtype):
    mesh, kind, shape, split = BATCHES[batch]
    mesh = mesh_of(mesh, kind)
    table, ids, rows, upstream, gradient = case(shape, dtype, 5)
    options = {"reduction": "all_to_all", "exchange": exchange, "padding_idx": 5, "padded_vocab_size": "even"}
    emb = ParallelVocabEmbedding.from_embedding(table, mesh, **options)
    ids = jax.device_put(ids.astype(np.int32), NamedSharding(mesh, split))
    output, pull_back = jax.vjp(jax.jit(lambda emb: emb(ids)), emb)
    assert_bits(output, rows)
    entry = output.sharding.spec[0]
    assert "tp" in (entry if isinstance(entry, tuple) else (entry,))
    found = pull_back(jax.device_put(upstream, output.sharding))[0].weight
    assert_bits(np.asarray(found)[:VOCAB], gradient)
    assert not np.asarray(found)[VOCAB:].any()
    assert_bits(emb(ids), rows)


def test_inside_a_shard_map_of_ones_own():
    mesh, (table, ids, rows, upstream, gradient) = mesh_of((4,)), case((8, 3))
    padded = np.concatenate([table, np.zeros((3, EMB), np.float32)])
    partition = VocabPartition(VOCAB, 4, "even")

    def step(weight, ids, upstream):
        output, pull_back = jax.vjp(lambda w: reduced_lookup(w, ids, partition, "tp", reduction="all_to_all"), weight)
        return output, pull_back(upstream)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("tp"), P("tp"), P("tp")), out_specs=(P("tp"), P("tp")))
    output, found = jax.jit(mapped)(padded, ids.astype(np.int32), upstream)
    assert_bits(output, rows)
    assert_bits(np.asarray(found)[:VOCAB], gradient)


def test_collectives():
    """Ids are gathered once, rows take one collective, the table none."""
    mesh = mesh_of((4,))
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh, reduction="all_to_all", exchange="dense", padded_vocab_size="even")
    ids = jax.device_put(jnp.arange(8), NamedSharding(mesh, P("tp")))
    text = jax.jit(lambda emb, ids: emb(ids)).lower(emb, ids).compile().as_text()
    assert len(re.findall(r"= \S+ all-gather(?:-start)?\(", text)) == 1
    assert len(re.findall(r"= \S+ (?:reduce-scatter|all-to-all|all-reduce)\(", text)) == 1


def test_transforms_and_empty_batch():
    mesh, (table, ids, *_) = mesh_of((4,)), case((8, 3))
    table[~np.isfinite(table)] = 1
    emb = ParallelVocabEmbedding.from_embedding(table, mesh, reduction="all_to_all", padded_vocab_size="even")
    ids = ids.astype(np.int32)
    twice = jax.grad(lambda w: jax.grad(lambda w: (emb.with_weight(w)(ids) ** 2).sum())(w).sum())(emb.weight)
    counts = np.zeros(VOCAB)
    np.add.at(counts, ids[(ids >= 0) & (ids < VOCAB)], 1)
    np.testing.assert_array_equal(np.asarray(twice)[:VOCAB, 0], 2 * counts)
    many = jax.vmap(emb)(jnp.stack([ids, ids[::-1]]))
    np.testing.assert_array_equal(many[1], np.asarray(emb(ids[::-1])))
    for run in (emb, jax.jit(emb)):
        assert run(np.zeros((0, 3), np.int32)).shape == (0, 3, EMB)
    with pytest.raises(IndexError, match="99"):
        ParallelVocabEmbedding.from_embedding(
            table, mesh, reduction="all_to_all", padded_vocab_size="even", invalid_ids="error"
        )(np.full(4, 99))


@pytest.mark.parametrize("shape", [(), (3,), (6, 4)])
def test_batch_that_cannot_be_split_is_refused(shape):
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh_of((4,)), reduction="all_to_all", padded_vocab_size="even")
    with pytest.raises(ValueError, match=r"the first dimension of the ids must be divisible by the 4 ranks along tp"):
        emb(np.zeros(shape, np.int32))
