"""Meshes of CPU devices, and what is compiled for them."""

import re
from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shared.bits import unsigned_view

_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def make_mesh(shape=(4,), names=("tp",), kind="Auto"):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, (getattr(AxisType, kind),) * len(shape), devices=devices)


def on(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def collectives(function, *arguments):
    """How often each collective is in the compiled program."""
    return dict(Counter(_COLLECTIVE.findall(jax.jit(function).lower(*arguments).compile().as_text())))


def assert_same_bits(found, expected, note=""):
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), note
    np.testing.assert_array_equal(unsigned_view(found), unsigned_view(expected), err_msg=str(note))


def backward(emb, ids, upstream):
    """The gradient of a layer's table."""
    return jax.vjp(lambda emb: emb(ids), emb)[1](upstream)[0].weight
