"""With what else a training run is made of: torch.compile, activation checkpointing, DDP and FSDP2, over gloo."""

import contextlib
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from torch_impl import ParallelVocabEmbedding

MODES = [("all_reduce", "dense"), ("all_reduce", "routed"), ("reduce_scatter", "dense"), ("reduce_scatter", "routed")]
VOCAB, EMB = 48, 8


def embedding(reduction, exchange, group, **options):
    return ParallelVocabEmbedding(VOCAB, EMB, process_group=group, reduction=reduction, exchange=exchange, **options)


def whole_table(world_size):
    return torch.cat([ParallelVocabEmbedding(VOCAB, EMB, r, world_size).weight.detach() for r in range(world_size)])


def own_part(tensor, emb):
    return tensor.chunk(emb.world_size, dim=1)[emb.rank] if emb.reduction == "reduce_scatter" else tensor


def check_compile(backend):
    """One graph, forward and backward, with the collectives in it, and the same values."""
    ids = torch.arange(32).view(4, 8) * 5 % VOCAB
    for reduction, exchange in MODES:
        torch._dynamo.reset()
        emb = embedding(reduction, exchange, dist.group.WORLD, padding_idx=5)
        upstream = torch.randint(-4, 4, emb(ids).shape).float()
        dist.broadcast(upstream, 0)
        emb(ids).backward(upstream)
        expected, emb.weight.grad = emb.weight.grad, None
        compiled = torch.compile(lambda ids: emb(ids) * 2, fullgraph=True, backend=backend)  # noqa: B023
        output = compiled(ids)
        assert torch.equal(output, emb(ids) * 2)
        output.backward(upstream / 2)
        assert torch.equal(emb.weight.grad, expected), (reduction, exchange)
        assert torch.equal(compiled(ids.flip(0)), emb(ids.flip(0)) * 2)


def test_compile(world):
    world(2)(check_compile, "aot_eager")


@pytest.mark.slow
def test_compile_with_inductor(world):
    world(2)(check_compile, "inductor")


class Model(nn.Module):
    """An embedding, a hidden layer and a sum: the least that has parameters on both sides of a wrapper."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.out = nn.Linear(EMB, 3)

    def forward(self, ids):
        return self.out(self.emb(ids)).square()


def check_checkpoint():
    """The forward is run again in backward: the same collectives, in the same order, on every rank."""
    ids = torch.arange(32).view(4, 8) * 5 % VOCAB
    for reduction, exchange in MODES:
        model = Model(embedding(reduction, exchange, dist.group.WORLD))
        model(ids).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        checkpoint(model, ids, use_reentrant=False).sum().backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
        model.zero_grad()
        hidden = checkpoint(model.emb, ids, use_reentrant=False)
        model.out(hidden).square().sum().backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_activation_checkpointing(world):
    world(2)(check_checkpoint)


def reference_gradient(ids, tensor_world):
    """The gradient of the whole table, by ``F.embedding``, for all data ranks' ids together."""
    table = whole_table(tensor_world).requires_grad_()
    model = Model(nn.Identity())
    model.out(nn.functional.embedding(ids, table)).square().sum().backward()
    return table.grad


def check_data_parallel(wrapper):
    """A 2-D mesh: the table split over ``tp``, the batch over ``dp``; gradients are those of the whole, averaged."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    batches = [torch.arange(16).view(2, 8) * 5 % VOCAB, torch.arange(16).view(2, 8) * 7 % VOCAB]
    data_rank = mesh.get_local_rank("dp")
    for reduction, exchange in MODES:
        emb = embedding(reduction, exchange, mesh.get_group("tp"))
        model = Model(emb)
        if wrapper == "ddp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the reducer's own making
                wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        else:
            fully_shard(emb, mesh=mesh["dp"])
            wrapped = fully_shard(model, mesh=mesh["dp"])
        output = wrapped(batches[data_rank])
        output.sum().backward()
        gradient = emb.weight.grad
        if wrapper == "fsdp":
            assert gradient.to_local().shape == (emb.partition.rows_per_rank // 2, EMB)
            gradient = gradient.full_tensor()
        whole = (reference_gradient(batches[0], 2) + reference_gradient(batches[1], 2)) / 2
        start = emb.partition.start(emb.rank)
        # Sums of at most 16 products of order 1, in another order: some roundings of float32.
        torch.testing.assert_close(gradient, whole[start : start + emb.partition.rows_per_rank], rtol=1e-5, atol=1e-5)


def test_ddp(world):
    world(4)(check_data_parallel, "ddp")


def test_fsdp2(world):
    world(4)(check_data_parallel, "fsdp")


def check_data_parallel_over_the_own_ranks(wrapper, compiled):
    """With a group and without one; what leaves the table out works."""
    ids = torch.arange(8)
    for group in (dist.group.WORLD, None):
        numbers = {} if group else {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        for leave_out in (False, True):
            emb = ParallelVocabEmbedding(VOCAB, EMB, process_group=group, **numbers)
            model, before = Model(emb), emb.weight.detach().clone()
            refused = contextlib.nullcontext() if leave_out else pytest.raises(ValueError, match="hold the same rows")
            if wrapper == "ddp":
                if leave_out:
                    ddp = nn.parallel.DistributedDataParallel
                    ddp._set_params_and_buffers_to_ignore_for_model(model, ["emb.weight"])
                wrapped = nn.parallel.DistributedDataParallel(model)
                with refused:
                    (torch.compile(wrapped, backend="aot_eager") if compiled else wrapped)(ids).sum().backward()
            else:
                with refused:
                    fully_shard(model, ignored_params={emb.weight} if leave_out else None)(ids).sum().backward()
            assert not leave_out or torch.equal(emb.weight, before)


@pytest.mark.parametrize(
    ("wrapper", "compiled"), [("ddp", False), pytest.param("ddp", True, marks=pytest.mark.slow), ("fsdp", False)]
)
def test_data_parallelism_over_tensor_ranks_is_refused(world, wrapper, compiled):
    world(2)(check_data_parallel_over_the_own_ranks, wrapper, compiled)


def check_autocast():
    ids = torch.arange(16).view(2, 8)
    for (reduction, exchange), dtype in itertools.product(MODES, (torch.float32, torch.bfloat16)):
        emb = embedding(reduction, exchange, dist.group.WORLD, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(emb(ids), emb(ids))
            assert emb(ids).dtype == dtype


def test_autocast_changes_nothing(world):
    world(2)(check_autocast)
