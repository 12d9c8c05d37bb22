"""Train over several processes: the table is split over all devices, the sequence too.

Run one process a host with COORDINATOR=host:port and PROCESS=0, 1.
"""

import os

import jax

if os.environ.get("JAX_PLATFORMS") == "cpu":  # two CPU devices and gloo stand in for accelerators and their network
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(os.environ["COORDINATOR"], num_processes=2, process_id=int(os.environ["PROCESS"]))
import jax.numpy as jnp
from jax.sharding import AxisType

from jax_impl import ParallelVocabEmbedding

mesh = jax.make_mesh((jax.device_count(),), ("tp",), (AxisType.Auto,))
emb = ParallelVocabEmbedding(32000, 64, mesh, reduction="reduce_scatter", init_std=0.1)
head = jnp.zeros((64, 1))
ids = jax.random.randint(jax.random.key(0), (4, 128), 0, 32000)  # [b, s], the same in all processes


@jax.jit
def step(parameters, ids):
    def loss(parameters):
        emb, head = parameters
        return jnp.mean((emb(ids) @ head - 1) ** 2)  # emb(ids): [b, s, e], s split over the devices

    value, gradient = jax.value_and_grad(loss)(parameters)
    return value, jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradient)


parameters = (emb, head)
for number in range(5):
    value, parameters = step(parameters, ids)
    if jax.process_index() == 0:
        print(f"step {number}: loss {value:.3f}, {mesh.size} devices in {jax.process_count()} processes")
