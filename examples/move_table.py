"""Move a table from PyTorch to JAX and back: without files, and bit for bit.

Run: python examples/move_table.py
"""

import jax
import torch

jax.config.update("jax_num_cpu_devices", 4)  # on a machine without four accelerators
import jax_impl
import torch_impl

ranks = [torch_impl.ParallelVocabEmbedding(32000, 64, rank=r, world_size=4) for r in range(4)]

mesh = jax.make_mesh((4,), ("tp",))
layer = jax_impl.ParallelVocabEmbedding(32000, 64, mesh)
parts = [rank.weight.detach() for rank in ranks]
layer = layer.with_weight(jax_impl.array_from_dlpack(parts, layer.weight.sharding, copy=True))

back = torch_impl.shards_from_dlpack(layer.weight, copy=False)  # the memory of JAX's shards
for rank, part in zip(ranks, back, strict=True):
    assert torch.equal(rank.weight, part)
print(f"{layer.weight.shape[0]} rows went to JAX and back, equal in every bit")
