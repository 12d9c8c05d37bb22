"""Gradients clipped by the norm of what all ranks hold, against the unsharded model."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch_layers import Model, array_of, assert_refused, mesh_of, named, on_ranks, over, rows_of, whole, whole_model

from torch_impl import ParallelVocabEmbedding, clip_grad_norm_

VOCAB, EMB = 23, 4
CLIPS = {
    "ours": clip_grad_norm_,
    "torch's own": lambda model, *arguments: nn.utils.clip_grad_norm_(model.parameters(), *arguments),
}


def replicate(module, mesh):
    """As plans of parallelize_module do: torch's own clipping wants all parameters on one mesh."""
    distribute_module(
        module,
        mesh,
        input_fn=lambda _, inputs, __: DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),
        output_fn=lambda _, out, __: out.to_local(),
    )


def train(model, clip, norm_type):
    """The norms of some steps; in float64, where they differ by some roundings: another norm is far off."""
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3), []
    for ids in torch.randint(0, VOCAB, (10, 2, 8), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        model(ids).mean().backward()
        norms.append(whole(CLIPS[clip](model, 0.05, norm_type)))
        optimizer.step()
    return torch.stack(norms)


def check_training(clip, place, norm_type):
    options = {"reduction": "all_reduce", "init": "global", "dtype": torch.float64}
    reference = whole_model(ParallelVocabEmbedding(VOCAB, EMB, **options).weight.detach())
    expected = train(reference, "torch's own", norm_type)
    for split in (False, True):  # over two ranks, and by fully_shard over two more
        mesh = mesh_of(2, 2) if split else mesh_of(4)
        tp = mesh["tp"] if split else mesh
        model = Model(ParallelVocabEmbedding(VOCAB, EMB, **over(place, tp), **options))
        if clip == "torch's own":
            replicate(model.out, tp)
        if split:
            fully_shard(model, mesh=mesh["dp"])
        with named("split" if split else "whole"):
            norms = train(model, clip, norm_type)
            torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0)
            for name, parameter in reference.named_parameters():
                found = whole(model.get_parameter(name))
                if name == "emb.weight":
                    found, parameter = rows_of(model.emb, found, parameter)
                torch.testing.assert_close(found, parameter, rtol=1e-9, atol=1e-12)
    return array_of(whole(model.out.weight)).tobytes()


@pytest.mark.parametrize(
    ("clip", "place", "norm_type"),
    [
        ("torch's own", "device_mesh", 2.0),
        ("ours", "device_mesh", 2.0),
        ("ours", "process_group", 2.0),
        ("ours", "process_group", 1.0),
        ("ours", "process_group", math.inf),
    ],
)
def test_training_follows_the_unsharded_model(world, clip, place, norm_type):
    ranks = world(4)(check_training, clip, place, norm_type)
    assert all(weight == ranks[0] for weight in ranks)


@pytest.mark.parametrize(("norm_type", "norm"), [(2.0, 2.0), (math.inf, 1.0)])
@on_ranks(2)
def test_a_rank_without_a_gradient(norm_type, norm):
    emb = ParallelVocabEmbedding(24, EMB, process_group=dist.group.WORLD)
    if emb.rank == 0:
        emb(torch.tensor([1])).sum().backward()
    assert clip_grad_norm_(emb, 1.0, norm_type) == norm


@pytest.mark.parametrize(("dtype", "sparse"), [(torch.bfloat16, False), (torch.float32, True)])
def test_one_rank(dtype, sparse):
    emb = ParallelVocabEmbedding(VOCAB, EMB, dtype=dtype, sparse=sparse)
    emb(torch.tensor([3, 3, 5])).sum().backward()
    norm = clip_grad_norm_(emb, 1.0)
    assert (norm, norm.dtype) == (torch.tensor(20.0).sqrt(), torch.float32)
    grad = emb.weight.grad.to_dense().float()
    torch.testing.assert_close(grad.norm(), torch.tensor(1.0), rtol=float(torch.finfo(dtype).eps), atol=1e-6)


def test_what_cannot_be_clipped_is_refused():
    several, emb = ParallelVocabEmbedding(24, EMB, 1, 2), ParallelVocabEmbedding(VOCAB, EMB)
    emb.weight.grad = torch.full_like(emb.weight, math.nan)
    assert_refused(
        (ValueError, "process_group must be given to a layer of 2 ranks", lambda: clip_grad_norm_(several, 1.0)),
        (ValueError, "norm_type must be above 0, got 0", lambda: clip_grad_norm_(emb, 1.0, 0)),
        (RuntimeError, "gradients is nan", lambda: clip_grad_norm_(emb, 1.0, error_if_nonfinite=True)),
    )
    # So Megatron knows that the table is split.
    weight = several.weight
    assert (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride) == (True, 0, 1)
