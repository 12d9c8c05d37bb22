"""With what else a training run is made of: activation checkpointing, DDP, FSDP2 and autocast, over gloo."""

import contextlib
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from marks import slower
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_layers import (
    MODES,
    Model,
    mesh_of,
    named,
    on_ranks,
    ranks_of,
    whole_model,
    whole_table,
    without_warnings,
)

from torch_impl import ParallelVocabEmbedding

VOCAB, EMB = 48, 8


def embedding(reduction, exchange, group, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, process_group=group, reduction=reduction, exchange=exchange, **options)


@on_ranks(2)
def test_activation_checkpointing():
    """The forward is run again in backward: the same collectives, in the same order, on every rank."""
    ids = torch.arange(32).view(4, 8) * 5 % VOCAB
    for mode in MODES:
        model, gradients = Model(embedding(*mode, dist.group.WORLD)), []
        for call in (model, partial(checkpoint, model, use_reentrant=False)):
            model.zero_grad()
            call(ids).sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)), mode


@on_ranks(2)
def test_autocast():
    ids = torch.arange(16).view(2, 8)
    for mode, dtype in itertools.product([("none", "auto"), *MODES], (torch.float32, torch.bfloat16)):
        emb = embedding(*mode, dist.group.WORLD, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = emb(ids)
        assert found.dtype == dtype
        assert torch.equal(found, emb(ids)), mode


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@on_ranks(4)
def test_data_parallelism_over_the_other_dimension(wrapper):
    """A 2-D mesh: the table split over ``tp``, the batch over ``dp``; gradients are those of the whole, averaged."""
    mesh = mesh_of(2, 2)
    batches = [torch.arange(16).view(2, 8) * 5 % VOCAB, torch.arange(16).view(2, 8) * 7 % VOCAB]
    reference = whole_model(whole_table(ranks_of(VOCAB, EMB, 2)))
    (reference(torch.cat(batches)).sum() / 2).backward()
    whole = reference.emb.weight.grad
    for mode in MODES:
        emb = embedding(*mode, mesh.get_group("tp"))
        model = Model(emb)
        if wrapper == "ddp":
            with without_warnings():  # of the reducer's own making
                wrapped = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        else:
            fully_shard(emb, mesh=mesh["dp"])
            wrapped = fully_shard(model, mesh=mesh["dp"])
        with named(*mode):
            wrapped(batches[mesh.get_local_rank("dp")]).sum().backward()
            gradient = emb.weight.grad
            if wrapper == "fsdp":
                assert gradient.to_local().shape == (emb.partition.rows_per_rank // 2, EMB)
                gradient = gradient.full_tensor()
            # Sums of at most 16 products of order 1, in another order: some roundings of float32.
            torch.testing.assert_close(gradient, whole.chunk(2)[emb.rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wrapper", "compiled"), [("ddp", False), slower("ddp", True), ("fsdp", False)])
@on_ranks(2)
def test_data_parallelism_over_tensor_ranks_is_refused(wrapper, compiled):
    """With a group and without one. What leaves the table out works, each rank with its own ids."""
    ids, own = torch.arange(8) + dist.get_rank(), {"process_group": dist.group.WORLD, "reduction": "all_to_all"}
    for options, leave_out in itertools.product((own, {"rank": dist.get_rank(), "world_size": 2}), (False, True)):
        model = Model(ParallelVocabEmbedding(VOCAB, EMB, **options))
        weight, before = model.emb.weight, model.emb.weight.detach().clone()
        if wrapper == "ddp" and leave_out:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["emb.weight"])
        with contextlib.nullcontext() if leave_out else pytest.raises(ValueError, match="hold the same rows"):
            if wrapper == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                wrapped = fully_shard(model, ignored_params={weight} if leave_out else None)
            (torch.compile(wrapped, backend="aot_eager") if compiled else wrapped)(ids).sum().backward()
        assert not leave_out or torch.equal(weight, before)
