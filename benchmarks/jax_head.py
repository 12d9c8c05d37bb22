"""The JAX head measurement: our loss, and the compiler's own partitioning of a dense one."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import shuffled
from jax_impl import ParallelLMHead, ParallelVocabEmbedding

__all__ = ["main"]

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(hidden [T, e], table [v, e], targets [T])`` to the mean loss."""


def _ours(spec: dict[str, Any], mesh: Mesh) -> Loss:
    emb = ParallelVocabEmbedding.abstract(spec["vocab_size"], spec["emb_size"], mesh, dtype=spec["dtype"])
    return lambda hidden, table, targets: ParallelLMHead(jax.tree.map(lambda _: table, emb))(hidden, targets)


def _dense(spec: dict[str, Any], mesh: Mesh) -> Loss:
    import optax

    def loss(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.dot(hidden, table.T, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


_MAKERS = {"ours": _ours, "optax, GSPMD": _dense}


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds by round, temporary memory per device and the loss, all candidates in turn."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((spec["world_size"],), ("tp",), auto, devices=jax.devices()[: spec["world_size"]])
    rows, whole = NamedSharding(mesh, PartitionSpec("tp", None)), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)
    table = rng.standard_normal((spec["vocab_size"], spec["emb_size"]), np.float32) * spec["emb_size"] ** -0.5
    table = jax.device_put(table.astype(spec["dtype"]), rows)
    hidden = rng.standard_normal((spec["tokens"], spec["emb_size"]), np.float32).astype(spec["dtype"])
    arguments = (
        jax.device_put(hidden, whole),
        table,
        jax.device_put(rng.integers(0, spec["vocab_size"], spec["tokens"]).astype(np.int32), whole),
    )
    steps, found = {}, {}
    for name in spec["candidates"]:
        step = jax.jit(
            jax.value_and_grad(_MAKERS[name](spec, mesh), argnums=(0, 1)), out_shardings=(whole, (whole, rows))
        )
        steps[name] = step.lower(*arguments).compile()
        memory = steps[name].memory_analysis()
        found[name] = {"times": [], "temporary_bytes": memory.temp_size_in_bytes}
    for turn in range(-1, spec["rounds"]):
        for place in shuffled(len(steps), turn + 1):
            name = spec["candidates"][place]
            start = time.perf_counter()
            loss, _gradients = jax.block_until_ready(steps[name](*arguments))
            if turn >= 0:
                found[name]["times"].append(time.perf_counter() - start)
            found[name]["loss"] = float(loss)
    return found


def main() -> None:
    """Run as ``python -m benchmarks.jax_head SPEC RESULT``."""
    spec, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", spec["world_size"])
    result.write_text(json.dumps(_measure(spec)))


if __name__ == "__main__":
    main()
