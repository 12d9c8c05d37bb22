"""One compiled graph for any number of ids: every reduction, forward and backward, at w = 1 and over gloo."""

import itertools

import pytest
import torch
import torch.distributed as dist

REDUCTIONS = ["none", "all_reduce", "reduce_scatter"]
SHAPES = [(2, 8), (2, 12), (4, 4), (1, 4), (3, 20), (5, 6), (7, 16), (2, 10)]


PAIRS = [("none", 5), ("all_reduce", None), ("reduce_scatter", 5)]


def check(backend, group, dynamic, cases=PAIRS):
    from torch._dynamo.testing import CompileCounterWithBackend

    from torch_impl import ParallelVocabEmbedding

    for reduction, padding_idx in cases:
        torch._dynamo.reset()
        emb = ParallelVocabEmbedding(48, 6, process_group=group, reduction=reduction, padding_idx=padding_idx)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(emb, fullgraph=True, backend=counter, dynamic=dynamic)
        for shape in SHAPES:
            ids = (torch.arange(shape[0] * shape[1]) * 7 - 2).view(shape)
            results = []
            for call in (emb, compiled):
                emb.weight.grad = None
                output = call(ids)
                output.sum().backward()
                results.append((output.detach(), emb.weight.grad))
            assert torch.equal(results[0][0], results[1][0]), (reduction, shape)
            assert torch.equal(results[0][1], results[1][1]), (reduction, shape)
        assert counter.frame_count <= 4, reduction  # the first shape, any sequence, any batch, a batch of one


def test_one_rank():
    check("aot_eager", None, None)


@pytest.mark.slow
def test_every_case_on_one_rank():
    cases = [*itertools.product(REDUCTIONS, (None, 5))]
    check("aot_eager", None, None, cases)
    check("aot_eager", None, True, cases)


def check_in_a_group(backend):
    check(backend, dist.group.WORLD, None)


@pytest.mark.slow
def test_two_ranks(world):
    world(2)(check_in_a_group, "aot_eager")


@pytest.mark.slow
def test_two_ranks_with_inductor(world):
    world(2)(check_in_a_group, "inductor")
