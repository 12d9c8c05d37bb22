"""Cross entropies of an output head, as PyTorch and its other libraries compute them."""

import warnings
from collections.abc import Callable

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared import VocabPartition

__all__ = ["Loss", "dense", "dtensor", "megatron", "torch_linear"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(hidden [T, e], rows [n, e], targets [T])`` to the mean loss."""


def dense(partition: VocabPartition) -> Loss:
    return lambda hidden, rows, targets: F.cross_entropy(F.linear(hidden, rows), targets)


def torch_linear(partition: VocabPartition) -> Loss:
    return F.linear_cross_entropy


def megatron(partition: VocabPartition) -> Loss:
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=partition.world_size)

    def loss(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(copy_to_tensor_model_parallel_region(hidden), rows)
        return vocab_parallel_cross_entropy(logits, targets).mean()

    return loss


def dtensor(partition: VocabPartition) -> Loss:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = dist.init_device_mesh("cpu", (partition.world_size,))

    def loss(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        logits = F.linear(whole, DTensor.from_local(rows, mesh, [Shard(0)], run_check=False))
        return F.cross_entropy(logits, targets)

    loss_parallel().__enter__()  # for the backward too, in all of this process
    return loss
