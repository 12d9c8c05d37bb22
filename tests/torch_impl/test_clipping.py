"""Gradients clipped by the norm of what all ranks hold, against the unsharded model."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from torch_impl import ParallelVocabEmbedding, clip_grad_norm_

VOCAB, EMB, STEPS = 24, 4, 30


class Model(nn.Module):
    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        torch.manual_seed(1)
        self.out = nn.Linear(EMB, EMB)

    def forward(self, ids):
        return self.out(self.emb(ids)).square().mean()


def unsharded(table, dtype):
    model = Model(nn.Embedding(VOCAB, EMB)).to(dtype)
    with torch.no_grad():
        model.emb.weight.copy_(table)
    return model


def batches(dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (STEPS, 2, 8), generator=generator)


def check_training(norm_type, reduction):
    """In float64, where 30 steps differ by some roundings: what is clipped by another norm is far off."""
    dtype, world_size = torch.float64, dist.get_world_size()
    table = torch.cat(
        [ParallelVocabEmbedding(VOCAB, EMB, r, world_size, dtype=dtype).weight for r in range(world_size)]
    )
    emb = ParallelVocabEmbedding(VOCAB, EMB, process_group=dist.group.WORLD, dtype=dtype, reduction=reduction)
    model, whole = Model(emb).to(dtype), unsharded(table.detach(), dtype)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, whole)]
    for ids in batches(dtype):
        for each, optimizer in zip((model, whole), optimizers, strict=True):
            optimizer.zero_grad()
            each(ids).backward()
        norm = clip_grad_norm_(model, 0.05, norm_type)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.05, norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-9, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(model.out.weight, whole.out.weight, rtol=1e-7, atol=1e-9)
    rows = slice(emb.partition.start(emb.rank), emb.partition.stop(emb.rank))
    torch.testing.assert_close(emb.weight, whole.emb.weight[rows], rtol=1e-7, atol=1e-9)
    everyones = [torch.empty_like(model.out.weight) for _ in range(world_size)]
    dist.all_gather(everyones, model.out.weight.detach())
    assert all(torch.equal(each, everyones[0]) for each in everyones)


@pytest.mark.parametrize("norm_type", [2.0, pytest.param(1.0, marks=pytest.mark.slow), math.inf])
def test_training_follows_the_unsharded_model(world, norm_type):
    world(4)(check_training, norm_type, "all_reduce")


def check_fully_shard():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    emb = ParallelVocabEmbedding(VOCAB, EMB, process_group=mesh.get_group("tp"), reduction="all_reduce")
    table = torch.cat([ParallelVocabEmbedding(VOCAB, EMB, r, 2).weight for r in range(2)])
    model, whole = Model(emb), unsharded(table.detach(), torch.float32)
    fully_shard(model, mesh=mesh["dp"])
    ids = batches(torch.float32)[0]
    for each in (model, whole):
        each(ids).backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
    # Sums of 120 squares in another order.
    torch.testing.assert_close(clip_grad_norm_(model, 0.01), expected, rtol=1e-5, atol=0)
    rows = slice(emb.partition.start(emb.rank), emb.partition.stop(emb.rank))
    torch.testing.assert_close(emb.weight.grad.full_tensor(), whole.emb.weight.grad[rows], rtol=1e-5, atol=1e-8)


def test_fully_shard_on_the_other_dimension(world):
    world(4)(check_fully_shard)


def check_a_rank_without_a_gradient():
    emb = ParallelVocabEmbedding(VOCAB, EMB, process_group=dist.group.WORLD)
    if emb.rank == 0:
        emb(torch.tensor([1])).sum().backward()
    assert clip_grad_norm_(emb, 1.0) == 2.0


def test_a_rank_without_a_gradient(world):
    world(2)(check_a_rank_without_a_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparse", [False, True])
def test_one_rank(dtype, sparse):
    emb = ParallelVocabEmbedding(VOCAB, EMB, dtype=dtype, sparse=sparse)
    emb(torch.tensor([3, 3, 5])).sum().backward()
    norm = clip_grad_norm_(emb, 1.0)
    assert (norm, norm.dtype) == (torch.tensor(20.0).sqrt(), torch.float32)
    grad = emb.weight.grad.to_dense().float()
    torch.testing.assert_close(grad.norm(), torch.tensor(1.0), rtol=float(torch.finfo(dtype).eps), atol=1e-6)


def test_what_cannot_be_clipped_is_refused():
    emb = ParallelVocabEmbedding(VOCAB, EMB, rank=1, world_size=2)
    emb(torch.tensor([13])).sum().backward()
    with pytest.raises(ValueError, match="process_group must be given to a layer of 2 ranks"):
        clip_grad_norm_(emb, 1.0)
    emb = ParallelVocabEmbedding(VOCAB, EMB)
    with pytest.raises(ValueError, match="norm_type must be above 0, got 0"):
        clip_grad_norm_(emb, 1.0, 0)
    emb.weight.grad = torch.full_like(emb.weight, math.nan)
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        clip_grad_norm_(emb, 1.0, error_if_nonfinite=True)


def test_megatron_knows_that_the_table_is_split():
    weight = ParallelVocabEmbedding(VOCAB, EMB, rank=1, world_size=2).weight
    assert (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride) == (True, 0, 1)
