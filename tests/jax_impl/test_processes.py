"""Several processes, for real: two with two devices each, one mesh over all four. Each runs this file."""

import copy
import os
import pickle
import socket
import subprocess
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


def assert_shards(array, whole):
    """Each of this process's shards is its part of the whole."""
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def split_ids(mesh, rng, shape):
    """Ids in and around 12 for each rank, and the same split over data, where there is a data axis."""
    ids = rng.integers(-3, 12 * mesh.shape["tp"] + 3, shape).astype(np.int32)
    split = NamedSharding(mesh, P("dp") if "dp" in mesh.axis_names else P())
    return ids, jax.make_array_from_callback(shape, split, lambda index: ids[index])


def check(mesh, dtype, rng):
    w = mesh.shape["tp"]
    emb = ParallelVocabEmbedding(12 * w, 5, mesh, init_mean=0.25, init_std=0.5, dtype=dtype, padding_idx=3)
    keys = [jax.random.key(42 + rank) for rank in range(w)]
    table = np.concatenate([np.asarray(0.25 + 0.5 * jax.random.normal(key, (12, 5), dtype)) for key in keys])
    table[3] = 0
    assert_shards(emb.weight, table)
    with pytest.raises(TypeError, match="a table on a mesh of this process's devices can be pickled"):
        pickle.dumps(emb)
    assert copy.deepcopy(emb).weight.sharding == emb.weight.sharding

    ids, split = split_ids(mesh, rng, (4, 6))
    expected = np.stack([partial_lookup(table[12 * r :][:12], ids, emb.partition, r) for r in range(w)])
    for given in (ids, split):
        assert_shards(emb(given), expected)
    grad = jax.jit(jax.grad(lambda emb, ids: emb(ids).astype(jnp.float32).sum()))(emb, split).weight
    ones = np.ones((*ids.shape, 5), dtype)
    assert_shards(grad, weight_grad(ones, ids, VocabPartition(12 * w, 1), 0, padding_idx=3))

    strict = ParallelVocabEmbedding(12 * w, 5, mesh, invalid_ids="error")
    with pytest.raises(IndexError, match="is outside the vocabulary"):
        strict(split)
    assert_shards(emb.with_weight(2 * table).weight, 2 * table)


def check_reductions(mesh, dtype, rng):
    """Every reduction by every exchange: each shard is the unsharded lookup's, and the gradient the oracle's."""
    whole = VocabPartition(12 * mesh.shape["tp"], 1)
    table = rng.standard_normal((whole.vocab_size, 6)).astype(dtype)
    ids, split = split_ids(mesh, rng, (4, 8))
    upstream = exact_gradient(ids, 6, np.dtype(dtype), 0)
    for reduction, exchange in (("all_reduce", "dense"), ("reduce_scatter", "dense"), ("reduce_scatter", "routed")):
        options = {"dtype": dtype, "padding_idx": 3, "reduction": reduction, "exchange": exchange, "check": True}
        emb = ParallelVocabEmbedding(*table.shape, mesh, **options).with_weight(table)
        output, back = jax.vjp(lambda emb: emb(split), emb)
        assert_shards(output, partial_lookup(table, ids, whole, 0))
        cotangent = jax.make_array_from_callback(output.shape, output.sharding, lambda index: upstream[index])
        assert_shards(back(cotangent)[0].weight, weight_grad(upstream, ids, whole, 0, padding_idx=3))


def check_disagreement(mesh):
    """With ``check``, processes that differ are told so in both, and nothing is left waiting."""
    mine, ids = jax.process_index(), np.arange(8)
    emb = ParallelVocabEmbedding(48, 6, mesh, reduction="all_reduce", check=True)
    other = ParallelVocabEmbedding(48, 6, mesh, reduction=("all_reduce", "reduce_scatter")[mine], check=True)
    for layer, given, says in (
        (emb, ids + mine, "ids: SHA-256"),
        (emb, ids[mine:], r"shape of the ids: \(8,\) on process 0; \(7,\) on"),
        (other, ids, "reduction: all_reduce on process 0; reduce_scatter on process 1"),
    ):
        with pytest.raises(ValueError, match=f"the processes disagree about {says}"):
            layer(given)


def check_tables(mesh, folder):
    """Written by both processes, each its own shards, and read again onto another layout, each its own rows."""
    folder = Path(folder)
    options = {"init": "global", "dtype": jnp.bfloat16}
    emb = ParallelVocabEmbedding(50, 6, mesh, padded_vocab_size="even", **options)
    table = np.pad(normal_rows(0, 50, 6, np.dtype(jnp.bfloat16), 42), ((0, 14), (0, 0)))
    assert_shards(emb.weight, table[: emb.padded_vocab_size])
    assert_shards(jax.jit(lambda: ParallelVocabEmbedding(50, 6, mesh, padded_vocab_size=64, **options))().weight, table)
    target = folder / f"{'-'.join(mesh.axis_names)}.safetensors"
    emb.save_table(target)
    assert_shards(ParallelVocabEmbedding.from_table(target, mesh=mesh, padded_vocab_size=64).weight, table)
    with pytest.raises(ValueError, match="exists; pass --force"):
        emb.save_table(target)
    with pytest.raises(ValueError, match="disagree about path"):
        emb.save_table(folder / f"of process {jax.process_index()}.safetensors")
    assert not [*folder.glob(".*"), *folder.glob("of process *")]


def check_memory(mesh, folder):
    """A process needs memory for its own half of the rows, no more than one and a half times as much."""
    path, shape = Path(folder) / "large.safetensors", (2**16, 1024)
    half = 2 * shape[0] * shape[1]
    if jax.process_index() == 0:
        path.write_bytes(header := header_bytes("wte.weight", "float32", shape, {}))
        os.truncate(path, len(header) + 2 * half)
    multihost_utils.sync_global_devices("the file is there")

    def memory(what):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    emb = ParallelVocabEmbedding.from_table(path, mesh=mesh)
    assert half <= memory("VmHWM") - before < 1.5 * half, (memory("VmHWM") - before) / half
    assert all(not np.asarray(shard.data).any() for shard in emb.weight.addressable_shards)


def main():
    process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    assert len(jax.devices()) == 4
    rng = np.random.default_rng(0)
    for kind, shape, names, dtype in (
        ("Auto", (4,), ("tp",), jnp.float32),
        ("Auto", (2, 2), ("dp", "tp"), jnp.bfloat16),
        ("Auto", (2, 2), ("tp", "dp"), jnp.float32),
        ("Explicit", (2, 2), ("dp", "tp"), jnp.float32),
    ):
        mesh = jax.make_mesh(shape, names, (getattr(AxisType, kind),) * len(shape))
        with jax.set_mesh(mesh):
            check(mesh, dtype, rng)
            if kind == "Auto":
                check_tables(mesh, folder)
            if kind == "Auto" and names != ("tp", "dp"):
                check_reductions(mesh, dtype, rng)
            if names == ("tp",):
                check_memory(mesh, folder)
    check_disagreement(mesh)
    print("all equal")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_two_devices(tmp_path):
    for attempt in range(3):
        with socket.socket() as probe:  # JAX takes a port, not a file: another program may take it before JAX does
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        (folder := tmp_path / str(attempt)).mkdir()
        commands = [[sys.executable, __file__, str(process), port, str(folder)] for process in range(2)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes = [subprocess.Popen(command, **pipes) for command in commands]
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        if not any("address already in use" in output.lower() for output in outputs):
            break
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "all equal" in output


if __name__ == "__main__":
    main()
