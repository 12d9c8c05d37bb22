"""Embeddings split over ranks, as PyTorch's other libraries make them."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.cases import Case

__all__ = ["TorchRec", "dtensor", "fsdp2", "megatron"]


def megatron(case: Case) -> nn.Module:
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    config = ModelParallelConfig(
        tensor_model_parallel_size=case.world_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=getattr(torch, case.dtype),
        sequence_parallel=case.reduction == "reduce_scatter",
    )
    return VocabParallelEmbedding(
        case.vocab_size,
        case.emb_size,
        init_method=nn.init.normal_,
        config=config,
        reduce_scatter_embeddings=case.reduction == "reduce_scatter",
        tp_group=dist.group.WORLD,
    )


def dtensor(case: Case) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (case.world_size,))
    layout = Shard(1) if case.reduction == "reduce_scatter" else Replicate()
    embedding = nn.Embedding(case.vocab_size, case.emb_size, dtype=getattr(torch, case.dtype), device="meta")
    return parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=layout))


def fsdp2(case: Case) -> nn.Module:
    """The whole table is gathered before the lookup, and its gradient reduce-scattered and divided by the ranks.

    The table stays gathered until backward, which does not gather it a second time: the faster of FSDP2's two ways.
    """
    from torch.distributed.fsdp import fully_shard

    embedding = nn.Embedding(case.vocab_size, case.emb_size, dtype=getattr(torch, case.dtype), device="meta")
    mesh = dist.init_device_mesh("cpu", (case.world_size,))
    return fully_shard(embedding, mesh=mesh, reshard_after_forward=False).to_empty(device="cpu")


class TorchRec(nn.Module):
    """torchrec's row-wise sharding with its fused kernel: backward is a step of SGD, and there is no gradient.

    Its dense kernel, which has one, fails over gloo (torchrec 1.8.0, a split that does not match).
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        warnings.simplefilter("ignore")
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv

        w, cpu = case.world_size, torch.device("cpu")
        table = EmbeddingConfig(
            name="t", embedding_dim=case.emb_size, num_embeddings=case.vocab_size, feature_names=["ids"]
        )
        whole = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        sharder = EmbeddingCollectionSharder(fused_params={"learning_rate": 1.0})
        plan = construct_module_sharding_plan(
            whole, {"t": row_wise(compute_kernel="fused")}, sharder, local_size=w, world_size=w, device_type="cpu"
        )
        self.sharded = sharder.shard(whole, plan, ShardingEnv.from_process_group(dist.group.WORLD), cpu)

    @property
    def rows(self) -> Tensor:
        return self.sharded.state_dict()["embeddings.t.weight"].local_shards()[0].tensor

    def forward(self, ids: Tensor) -> Tensor:
        from torchrec import KeyedJaggedTensor

        one_each = torch.ones_like(ids, dtype=torch.int32)
        return self.sharded(KeyedJaggedTensor(keys=["ids"], values=ids, lengths=one_each))["ids"].values()
