"""One of two JAX processes with two devices each; run by test_processes.py, with its number and the coordinator's port."""

import copy
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition
from shared.global_normal import normal_rows
from shared.proof.generate import exact_gradient
from shared.proof.oracle import partial_lookup, weight_grad
from shared.tables.tensor_file import header_bytes


def check(mesh, dtype, rng):
    w = mesh.shape["tp"]
    emb = ParallelVocabEmbedding(12 * w, 5, mesh, init_mean=0.25, init_std=0.5, dtype=dtype, padding_idx=3)
    keys = [jax.random.key(42 + rank) for rank in range(w)]
    table = np.concatenate([np.asarray(0.25 + 0.5 * jax.random.normal(key, (12, 5), dtype)) for key in keys])
    table[3] = 0
    for shard in emb.weight.addressable_shards:
        np.testing.assert_array_equal(shard.data, table[shard.index])
    with pytest.raises(TypeError, match="a table on a mesh of this process's devices can be pickled"):
        pickle.dumps(emb)
    assert copy.deepcopy(emb).weight.sharding == emb.weight.sharding

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


def check_reductions(mesh, dtype, rng):
    """Every reduction by every exchange: each shard is the unsharded lookup's, and the gradient the oracle's."""
    w = mesh.shape["tp"]
    table = rng.standard_normal((12 * w, 6)).astype(dtype)
    ids = rng.integers(-3, 12 * w + 3, (4, 8)).astype(np.int32)
    whole = VocabPartition(12 * w, 1)
    expected, upstream = partial_lookup(table, ids, whole, 0), exact_gradient(ids, 6, np.dtype(dtype), 0)
    gradient = weight_grad(upstream, ids, whole, 0, padding_idx=3)
    spec = P("dp") if "dp" in mesh.axis_names else P()
    split = jax.make_array_from_callback(ids.shape, NamedSharding(mesh, spec), lambda index: ids[index])
    for reduction in ("all_reduce", "reduce_scatter"):
        for exchange in ("dense", "routed"):
            emb = ParallelVocabEmbedding(
                12 * w, 6, mesh, dtype=dtype, padding_idx=3, reduction=reduction, exchange=exchange, check=True
            ).with_weight(table)
            output, back = jax.vjp(lambda emb: emb(split), emb)
            for shard in output.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
            cotangent = jax.make_array_from_callback(output.shape, output.sharding, lambda index: upstream[index])
            for shard in back(cotangent)[0].weight.addressable_shards:
                np.testing.assert_array_equal(shard.data, gradient[shard.index])


def check_disagreement(mesh):
    """With ``check``, processes that differ are told so in both, and nothing is left waiting."""
    emb = ParallelVocabEmbedding(48, 6, mesh, reduction="all_reduce", check=True)
    ids = np.arange(8)
    with pytest.raises(ValueError, match="the processes disagree about ids: SHA-256"):
        emb(ids + jax.process_index())
    with pytest.raises(
        ValueError, match=r"the processes disagree about shape of the ids: \(8,\) on process 0; \(7,\) on"
    ):
        emb(ids[jax.process_index() :])
    reduction = ("all_reduce", "reduce_scatter")[jax.process_index()]
    other = ParallelVocabEmbedding(48, 6, mesh, reduction=reduction, check=True)
    with pytest.raises(
        ValueError, match="disagree about reduction: all_reduce on process 0; reduce_scatter on process 1"
    ):
        other(ids)


def check_tables(mesh, folder):
    """Written by both processes, each its own shards, and read again onto another layout, each its own rows."""
    folder = Path(folder)
    emb = ParallelVocabEmbedding(50, 6, mesh, init="global", padded_vocab_size="even", dtype=jnp.bfloat16)
    table = normal_rows(0, 50, 6, np.dtype(jnp.bfloat16), 42)

    def compare(emb):
        whole = np.concatenate([table, np.zeros((emb.padded_vocab_size - 50, 6), table.dtype)])
        for shard in emb.weight.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])

    compare(emb)
    compare(
        jax.jit(lambda: ParallelVocabEmbedding(50, 6, mesh, init="global", padded_vocab_size=64, dtype=jnp.bfloat16))()
    )
    name = "-".join(mesh.axis_names)
    target = folder / f"{name}.safetensors"
    emb.save_table(target)
    compare(ParallelVocabEmbedding.from_table(target, mesh=mesh, padded_vocab_size=64))
    with pytest.raises(ValueError, match="exists; pass --force"):
        emb.save_table(target)
    with pytest.raises(ValueError, match="disagree about path"):
        emb.save_table(folder / f"of process {jax.process_index()}.safetensors")
    assert not [*folder.glob(".*"), *folder.glob("of process *")]


def check_memory(mesh, folder):
    """A process needs memory for its own half of the rows, no more than one and a half times as much."""
    path, shape = Path(folder) / "large.safetensors", (2**16, 1024)
    header = header_bytes("wte.weight", "float32", shape, {})
    if jax.process_index() == 0:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + 4 * shape[0] * shape[1])
    multihost_utils.sync_global_devices("the file is there")

    def memory(what):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    emb = ParallelVocabEmbedding.from_table(path, mesh=mesh)
    half = 2 * shape[0] * shape[1]
    assert half <= memory("VmHWM") - before < 1.5 * half, (memory("VmHWM") - before) / half
    assert all(not np.asarray(shard.data).any() for shard in emb.weight.addressable_shards)


def main():
    process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
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
                if kind == AxisType.Auto:
                    check_tables(mesh, folder)
                if kind == AxisType.Auto and names == ("tp",):
                    check_memory(mesh, folder)
                if kind == AxisType.Auto and names != ("tp", "dp"):
                    check_reductions(mesh, jnp.float32 if shape == (4,) else jnp.bfloat16, rng)
    check_disagreement(mesh)
    print("all equal")


if __name__ == "__main__":
    main()
