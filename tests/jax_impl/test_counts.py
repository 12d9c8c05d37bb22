"""What a compiled lookup costs, counted in its program: collectives, gathers, and the arrays that are made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import backward, collectives, compiled, on

from jax_impl import ParallelVocabEmbedding

VOCAB, EMB, RANKS = 4096, 24, 4
ROWS = VOCAB // RANKS
IDS = np.arange(64, dtype=np.int32).reshape(4, 16)


def forward(emb, ids):
    return emb(ids)


def test_a_partial_lookup_is_one_gather_without_communication(mesh_of):
    mesh = mesh_of((RANKS,))
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh, dtype=jnp.bfloat16, padding_idx=4)
    program = compiled(forward, emb, IDS)
    assert collectives(program) == {}
    assert len(re.findall(r" gather\(", program.as_text())) == 1
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= IDS.size * (EMB * 2 + 64)
    assert memory.generated_code_size_in_bytes < ROWS * EMB * 2, "the table is no constant of the program"
    output = program(emb, IDS)
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("tp")), output.ndim)
    assert collectives(compiled(backward, emb, IDS, output)) == {}


SCATTER, GATHER, ROUTED = {"reduce-scatter": 1}, {"all-gather": 1}, {"all-to-all": 1}


@pytest.mark.parametrize(
    ("reduction", "exchange", "dtype", "over_ranks", "of_gradient"),
    [
        ("all_reduce", "dense", "bfloat16", {"all-reduce": 1}, {}),
        ("all_reduce", "routed", "float32", {"all-reduce": 1}, {}),
        ("reduce_scatter", "auto", "float32", SCATTER, GATHER),
        ("reduce_scatter", "dense", "bfloat16", SCATTER, GATHER),
        # Each way that a batch may take is in the program once; a run goes one of them.
        slower("reduce_scatter", "routed", "float32", SCATTER | ROUTED, GATHER | ROUTED),
        # Sums of 16-bit gradients are float32, and would be as many bytes.
        slower("reduce_scatter", "routed", "bfloat16", SCATTER | ROUTED, GATHER),
        # The ids are gathered, once in each pass.
        ("all_to_all", "dense", "float32", SCATTER | GATHER, {"all-gather": 2}),
    ],
)
def test_collectives(mesh_of, reduction, exchange, dtype, over_ranks, of_gradient):
    mesh = mesh_of((RANKS,))
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh, dtype=dtype, reduction=reduction, exchange=exchange)
    ids = on(mesh, IDS, *["tp"] * (reduction == "all_to_all"))
    program = compiled(forward, emb, ids)
    assert collectives(program) == over_ranks
    assert collectives(compiled(backward, emb, ids, program(emb, ids))) == of_gradient


@pytest.mark.parametrize(("reduction", "over_ranks"), [("none", {}), ("all_reduce", {"all-reduce": 1})])
def test_collectives_with_data_ranks(mesh_of, reduction, over_ranks):
    """The data ranks' gradients are added up, once; over the ranks of the table no gradient is sent."""
    mesh = mesh_of((2, 4), ("tp2", "tp"))  # names that contain each other
    ids, emb = on(mesh, IDS, "tp2"), ParallelVocabEmbedding(VOCAB, EMB, mesh, reduction=reduction)
    program = compiled(forward, emb, ids)
    assert collectives(program) == over_ranks
    found = compiled(backward, emb, ids, program(emb, ids)).as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", found)  # the compiler would gather the tokens
    groups = set(re.findall(r"all-reduce[^\n]*replica_groups=(.+?),? (?:use|chan|metadata|dim)", found))
    # Devices 0 to 3 hold the table for one data rank, 4 to 7 for the other: only i and i + 4 talk.
    assert groups
    assert groups <= {"{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "mesh['tp2'=2,'tp'=4] {'tp2'}"}, groups


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("none", "float32"), ("all_reduce", "float16"), ("reduce_scatter", "bfloat16")]
)
def test_no_device_makes_the_gradient_of_the_whole_table(mesh_of, reduction, dtype):
    """Nothing is said of how the gradient is to lie. 16-bit ones travel as they are, and are added in float32."""
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh_of((RANKS,)), dtype=dtype, reduction=reduction, seq_dim=0)

    def gradient(emb, ids):
        return jax.grad(lambda emb: (emb(ids).astype(jnp.float32) ** 2).sum())(emb)

    lowered = jax.jit(gradient).lower(emb, IDS.ravel())
    text = lowered.compile().as_text()
    assert len(re.findall(r" scatter\(", text)) <= 1
    assert f"[{ROWS},{EMB}]" in text
    assert f"[{VOCAB},{EMB}]" not in text
    assert re.search(rf"stablehlo.scatter.*?tensor<{ROWS}x{EMB}xf32>", lowered.as_text(), re.DOTALL)
    gathered = re.findall(r"stablehlo.all_gather.*?-> tensor<\S*x(\w+)>", lowered.as_text())
    assert gathered == (["bf16"] if reduction == "reduce_scatter" else [])
