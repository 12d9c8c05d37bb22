"""Run the JAX layer on a case, one device per rank."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl.vocab_emb import ParallelVocabEmbedding
from shared.proof.case import Case
from shared.proof.launch import serve
from shared.proof.record import RecordWriter

__all__ = ["make_mesh", "run", "shards"]


def run(case: Case, record: RecordWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record what every rank returns and its gradient, and the whole embedding.

    Raises:
        RuntimeError: the platform has fewer devices than the case has ranks. CPU devices are created as needed.
    """
    mesh = make_mesh(case)
    progress("table", 0, 4)
    emb = ParallelVocabEmbedding.from_table(
        case.weights,
        case.tensor,
        mesh,
        vocab_size=case.vocab_size,
        **case.config.changes(),
    )
    ids, grad_output = case.batch_array("ids"), case.batch_array("grad_output")
    if case.reduction == "all_to_all":  # each rank's own ids, concatenated along the first dimension
        ids, grad_output = (
            np.concatenate([case.part_of(each, rank) for rank in range(case.world_size)]) for each in (ids, grad_output)
        )
    progress("forward", 1, 4)
    output, pull_back = jax.vjp(lambda emb: emb(ids), emb)
    replicated = NamedSharding(mesh, PartitionSpec())
    total: Any = output
    if case.reduction == "none":
        total = jax.jit(lambda partials: jnp.sum(partials, axis=0), out_shardings=replicated)(output)
    progress("gradient", 2, 4)
    if case.reduction == "none":
        split = NamedSharding(mesh, PartitionSpec("tp"))
        upstream = jax.make_array_from_callback(output.shape, split, lambda _: grad_output[None])
    else:
        upstream = jax.device_put(grad_output, output.sharding)
    (gradient,) = pull_back(upstream)
    progress("record", 3, 4)
    parts = shards(output, mesh)
    for rank, part in enumerate(parts):
        record.add(f"forward.{rank}", part[0] if case.reduction == "none" else part)
    # The gradient of an empty batch is a constant, which lies on one device.
    for rank, rows in enumerate(shards(jax.device_put(gradient.weight, emb.weight.sharding), mesh)):
        record.add(f"gradient.{rank}", rows)
    record.add("sum", np.asarray(total) if case.reduction != "all_to_all" else case.whole_of(parts))


def make_mesh(case: Case) -> jax.sharding.Mesh:
    """Mesh of one device per rank; RuntimeError if there are fewer."""
    jax.config.update("jax_num_cpu_devices", case.world_size)
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    devices = jax.devices()
    if len(devices) < case.world_size:
        raise RuntimeError(
            f"the case needs {case.world_size} devices, JAX has {len(devices)} of platform {devices[0].platform}; "
            f"choose a smaller --world-size, or set JAX_PLATFORMS=cpu"
        )
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((case.world_size,), ("tp",), auto, devices=devices[: case.world_size])


def shards(array: jax.Array, mesh: jax.sharding.Mesh) -> list[Any]:
    """Each rank's shard or copy of an array, in NumPy."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [np.asarray(by_device[device]) for device in mesh.devices.flat]


if __name__ == "__main__":
    serve("jax", {"jax": jax.__version__}, run)
