"""One of two JAX processes with two devices each; run by test_processes.py, with its number and the coordinator's port."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding
from shared.oracle import partial_lookup, weight_grad


def check(mesh, dtype, rng):
    w = mesh.shape["tp"]
    emb = ParallelVocabEmbedding(12 * w, 5, mesh, init_mean=0.25, init_std=0.5, dtype=dtype, padding_idx=3)
    keys = [jax.random.key(42 + rank) for rank in range(w)]
    table = np.concatenate([np.asarray(0.25 + 0.5 * jax.random.normal(key, (12, 5), dtype)) for key in keys])
    table[3] = 0
    for shard in emb.weight.addressable_shards:
        np.testing.assert_array_equal(shard.data, table[shard.index])

    ids = rng.integers(-3, 12 * w + 3, (4, 6))
    expected = np.stack([partial_lookup(table[12 * r :][:12], ids, emb.partition, r) for r in range(w)])
    spec = P("dp") if "dp" in mesh.axis_names else P()
    split = jax.make_array_from_callback(ids.shape, NamedSharding(mesh, spec), lambda index: ids[index])
    for given in (ids, split):
        for shard in emb(given).addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])

    grad = jax.jit(jax.grad(lambda emb, ids: emb(ids).astype(jnp.float32).sum()))(emb, split).weight
    ones = np.ones((*ids.shape, 5), dtype)
    whole = np.concatenate([weight_grad(ones, ids, emb.partition, r, padding_idx=3) for r in range(w)])
    for shard in grad.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])

    strict = ParallelVocabEmbedding(12 * w, 5, mesh, invalid_ids="error")
    with pytest.raises(IndexError, match="is outside the vocabulary"):
        strict(split)
    for shard in emb.with_weight(2 * table).weight.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * table[shard.index])


def main():
    process, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    assert len(jax.devices()) == 4
    rng = np.random.default_rng(0)
    for kind in (AxisType.Auto, AxisType.Explicit):
        for shape, names in (((4,), ("tp",)), ((2, 2), ("dp", "tp")), ((2, 2), ("tp", "dp"))):
            mesh = jax.make_mesh(shape, names, (kind,) * len(shape))
            with jax.set_mesh(mesh):
                for dtype in (jnp.float32, jnp.bfloat16):
                    check(mesh, dtype, rng)
    print("all equal")


if __name__ == "__main__":
    main()
