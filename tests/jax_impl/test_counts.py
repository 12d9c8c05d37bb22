"""What a compiled lookup costs, counted in its program: collectives, gathers, and the arrays that are made."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from marks import pairwise, slower

from jax_impl import ParallelVocabEmbedding

VOCAB, EMB, RANKS = 4096, 24, 4
ROWS = VOCAB // RANKS
IDS = np.arange(60, dtype=np.int32).reshape(2, 30)
DTYPES = ["float32", "float16", "bfloat16"]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def layer(mesh_of, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, mesh_of((RANKS,)), **options)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def counted(text, names):
    found = Counter(re.findall(r" (" + "|".join(names) + r")(?:-start)?\(", text))
    return {name: number for name, number in found.items() if number}


def gradient(emb, ids):
    """Of the layer, with nothing said of how the result is to lie."""
    return jax.grad(lambda emb: (emb(ids).astype(jnp.float32) ** 2).sum())(emb)


@pytest.mark.parametrize("dtype", ["bfloat16", slower("float16"), slower("float32")])
def test_a_partial_lookup_is_one_gather(mesh_of, dtype):
    emb = layer(mesh_of, dtype=dtype)
    program = compiled(lambda emb, ids: emb(ids), emb, IDS)
    assert counted(program.as_text(), (*COLLECTIVES, "gather")) == {"gather": 1}
    output = IDS.size * EMB * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes <= output + 64 * IDS.size


@pytest.mark.parametrize(
    ("dtype", "reduction"), pairwise([("float32", "all_reduce"), ("bfloat16", "none")], DTYPES, ["none", "all_reduce"])
)
def test_the_gradient_is_local(mesh_of, reduction, dtype):
    text = compiled(gradient, layer(mesh_of, reduction=reduction, exchange="dense", dtype=dtype), IDS).as_text()
    forward = {"all-reduce": 1} if reduction == "all_reduce" else {}
    assert counted(text, COLLECTIVES) == forward
    assert counted(text, ("scatter",)).get("scatter", 0) <= 1


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    pairwise(
        [("bfloat16", "reduce_scatter"), ("float16", "all_reduce")],
        ["float16", "bfloat16"],
        ["none", "all_reduce", "reduce_scatter"],
    ),
)
def test_16_bit_gradient_sends_16_bits_and_adds_in_32(mesh_of, reduction, dtype):
    emb, ids = layer(mesh_of, reduction=reduction, seq_dim=0, dtype=dtype), IDS.reshape(60)
    lowered = jax.jit(gradient).lower(emb, ids).as_text()
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert re.search(rf"stablehlo.scatter.*?tensor<{ROWS}x{EMB}xf32>", lowered, re.DOTALL)
    gathered = re.findall(r"stablehlo.all_gather.*?-> tensor<\S*x(\w+)>", lowered)
    assert gathered == ([short] if reduction == "reduce_scatter" else [])


@pytest.mark.parametrize("reduction", [slower("none"), slower("all_reduce"), "reduce_scatter"])
def test_no_device_makes_the_gradient_of_the_whole_table(mesh_of, reduction):
    emb = layer(mesh_of, reduction=reduction, seq_dim=0 if reduction == "reduce_scatter" else -1)
    ids = IDS.reshape(60) if reduction == "reduce_scatter" else IDS
    text = compiled(gradient, emb, ids).as_text()
    assert f"[{ROWS},{EMB}]" in text
    assert f"[{VOCAB},{EMB}]" not in text


def test_the_compiler_left_to_itself_does():
    """What the layer is measured against: without it, each device makes all rows, unless every layout is pinned."""
    mesh = jax.make_mesh((RANKS,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:RANKS])
    everywhere = NamedSharding(mesh, PartitionSpec())
    table = jax.device_put(np.ones((VOCAB, EMB), np.float32), NamedSharding(mesh, PartitionSpec("tp", None)))

    def back(table, ids, upstream):
        return jax.vjp(functools.partial(jnp.take, indices=ids, axis=0), table)[1](upstream)[0]

    upstream = jax.device_put(np.ones((*IDS.shape, EMB), np.float32), everywhere)
    text = compiled(back, table, jax.device_put(IDS, everywhere), upstream).as_text()
    assert f"[{VOCAB},{EMB}]" in text
