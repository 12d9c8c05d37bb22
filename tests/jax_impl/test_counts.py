"""What a compiled lookup costs, counted in its program: collectives, gathers, and the arrays that are made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import backward, collectives, compiled, make_mesh, on

from jax_impl import ParallelVocabEmbedding

VOCAB, EMB, RANKS = 4096, 24, 4
ROWS = VOCAB // RANKS
IDS = np.arange(64, dtype=np.int32).reshape(4, 16)


def forward(emb, ids):
    return emb(ids)


def test_the_counter_sees_collectives():
    mesh = make_mesh()
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "tp"), mesh=mesh, in_specs=P("tp"), out_specs=P())
    assert collectives(compiled(summed, on(mesh, np.ones(8, np.float32), "tp"))) == {"all-reduce": 1}


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


@pytest.mark.parametrize(
    ("reduction", "dtype", "over_ranks"),
    [
        ("none", "float32", {}),
        ("all_reduce", "float16", {"all-reduce": 1}),
        ("reduce_scatter", "bfloat16", {"reduce-scatter": 1, "all-gather": 1}),
    ],
)
def test_no_device_makes_the_gradient_of_the_whole_table(mesh_of, reduction, dtype, over_ranks):
    """Nothing is said of how the gradient is to lie. 16-bit ones travel as they are, and are added in float32."""
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh_of((RANKS,)), dtype=dtype, reduction=reduction, seq_dim=0)

    def gradient(emb, ids):
        return jax.grad(lambda emb: (emb(ids).astype(jnp.float32) ** 2).sum())(emb)

    lowered = jax.jit(gradient).lower(emb, IDS.ravel())
    program = lowered.compile()
    text = program.as_text()
    assert collectives(program) == over_ranks
    assert len(re.findall(r" scatter\(", text)) <= 1
    assert f"[{ROWS},{EMB}]" in text
    assert f"[{VOCAB},{EMB}]" not in text
    assert re.search(rf"stablehlo.scatter.*?tensor<{ROWS}x{EMB}xf32>", lowered.as_text(), re.DOTALL)
    gathered = re.findall(r"stablehlo.all_gather.*?-> tensor<\S*x(\w+)>", lowered.as_text())
    assert gathered == (["bf16"] if reduction == "reduce_scatter" else [])
