"""Meshes of CPU devices, and what is compiled for them."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shared import VocabPartition
from shared.bits import unsigned_view
from shared.proof.generate import exact_gradient
from shared.proof.oracle import partial_lookup, weight_grad

_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def make_mesh(shape=(4,), names=("tp",), kind="Auto"):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, (getattr(AxisType, kind),) * len(shape), devices=devices)


def on(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def collectives(program):
    """How often each collective is in a compiled program."""
    return dict(Counter(_COLLECTIVE.findall(program.as_text())))


def assert_same_bits(found, expected, note=""):
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), note
    np.testing.assert_array_equal(unsigned_view(found), unsigned_view(expected), err_msg=str(note))


def backward(emb, ids, upstream):
    """The gradient of a layer's table."""
    return jax.vjp(lambda emb: emb(ids), emb)[1](upstream)[0].weight


def lookup_and_gradient(emb, ids, upstream):
    """The result, and the table's gradient where ``upstream`` is the result's, for partials that of each rank's."""
    output, pull_back = jax.vjp(lambda emb: emb(ids), emb)
    if isinstance(output, jax.core.Tracer):
        upstream = jnp.broadcast_to(upstream, output.shape, out_sharding=jax.typeof(output).sharding)
    else:
        upstream = jax.device_put(np.broadcast_to(upstream, output.shape), output.sharding)
    return output, pull_back(upstream)[0].weight


lookup_and_gradient_in_jit = jax.jit(lookup_and_gradient)


def assert_is_right(emb, ids, jit=True):
    """The layer's result, which is returned, and its table's gradient are the oracle's, bit for bit.

    Outside jit it is known how ids are split.
    """
    table, known = np.asarray(emb.weight), np.asarray(ids)
    whole = VocabPartition(emb.vocab_size, 1, emb.padded_vocab_size)
    upstream = exact_gradient(known, emb.emb_size, table.dtype, 0)  # its sums are exact in any order
    output, gradient = (lookup_and_gradient_in_jit if jit else lookup_and_gradient)(emb, ids, upstream)
    if emb.reduction == "none":
        ranks = enumerate(np.split(table, emb.world_size))
        expected = np.stack([partial_lookup(rows, known, emb.partition, rank) for rank, rows in ranks])
    else:
        expected = partial_lookup(table, known, whole, 0)
    note = f"{emb!r}, ids {known}"
    assert_same_bits(output, expected, note)
    assert_same_bits(gradient, weight_grad(upstream, known, whole, 0, emb.padding_idx), note)
    assert gradient.sharding.is_equivalent_to(emb.weight.sharding, 2), note
    return output
