"""The head's functions as JAX's: what is known of traced targets, and the compiled programs."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import compiled, make_mesh

from jax_impl import linear_cross_entropy, parallel_sample
from shared import VocabPartition


def alone(function, *arguments):
    mapped = jax.shard_map(function, mesh=make_mesh((1,)), in_specs=P(), out_specs=P())
    return jax.jit(mapped)(*arguments)


@pytest.mark.parametrize("dtypes", [("int8", "uint16", "uint32"), slower(("int64",))], ids=str)
def test_traced_targets_of_any_integer_dtype(dtypes):
    """An unsigned id that would wrap to the ignored one is invalid, which gives NaN; no ids at all give 0."""
    limits = {dtype: np.iinfo(dtype) for dtype in dtypes}
    loss = functools.partial(linear_cross_entropy, partition=VocabPartition(21, 1, 24), returns=("count",))

    def losses(targets):
        return {dtype: loss(jnp.ones((len(ids), 4)), jnp.ones((24, 4)), ids) for dtype, ids in targets.items()}

    with jax.enable_x64("int64" in dtypes):
        targets = {
            dtype: jnp.arange(8, dtype=dtype).at[0].set(-100 if known.min else known.max - 99)
            for dtype, known in limits.items()
        }
        found = jax.device_get(alone(losses, targets | {"none": jnp.zeros(0, int)}))
    assert found.pop("none") == (0, 0)
    for dtype, (mean, count) in found.items():
        assert count == 7, dtype
        assert np.isnan(mean) == (limits[dtype].min == 0), dtype


def test_random_numbers_out_of_range_draw_nothing():
    uniform = jnp.array([-0.1, 0.0, 1.0, jnp.nan])
    found = alone(lambda u: parallel_sample(jnp.zeros((4, 3)), VocabPartition(3, 1), uniform=u), uniform)
    assert found.tolist() == [-1, 0, -1, -1]


def programs(tokens, size, width, seq_dim=None):
    """The compiled forward, and the compiled loss with both gradients, over 4 ranks."""
    mesh, partition = make_mesh(), VocabPartition(size, 4)
    split = P() if seq_dim is None else P("tp")
    shapes = ((tokens, width), "bfloat16", split), ((size, width), "bfloat16", P("tp")), ((tokens,), "int32", P())
    given = [jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec)) for shape, kind, spec in shapes]
    loss = functools.partial(linear_cross_entropy, partition=partition, seq_dim=seq_dim)
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(split, P("tp"), P()), out_specs=P())
    return [compiled(each, *given) for each in (mapped, jax.value_and_grad(mapped, (0, 1)))]


def collectives(program):
    pattern = r"= \(?(\w+)\[\S* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return dict(Counter(f"{kind} {dtype}" for dtype, kind in re.findall(pattern, program.as_text())))


def test_collectives():
    """Statistics, and hidden's gradient in float32; with a split sequence its hidden states too."""
    forward, gradient = map(collectives, programs(64, 4096, 32))
    assert forward == {"all-gather f32": 1}
    assert gradient == {"all-gather f32": 1, "all-reduce f32": 1}
    forward, gradient = map(collectives, programs(64, 4096, 32, seq_dim=0))
    assert sum(forward.values()) == 2
    assert gradient.pop("reduce-scatter f32") == 1
    assert sum(gradient.values()) == 2
    assert all(name.startswith("all-gather") for name in (*forward, *gradient))


@pytest.mark.slow
def test_logits_are_never_whole():
    """8192 tokens, 131072 ids: the logits would take 4 GiB."""
    for program in programs(8192, 131072, 1024):
        # All of it is hidden's gradient in float32, before and after its sum over the ranks.
        assert program.memory_analysis().temp_size_in_bytes <= 64 * 2**20 + 4096
        assert not re.search(r"\[8192,(?:131072|32768)\]", program.as_text())
