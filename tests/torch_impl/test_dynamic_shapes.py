"""One compiled graph for any number of ids, with the eager results: every reduction, at w = 1 and over gloo."""

import pytest
import torch
import torch.distributed as dist

# The first shape, another sequence, another batch, a batch of one, and others that must fit what is there by then.
SHAPES = [(2, 8), (2, 12), (4, 4), (1, 4), (3, 20), (7, 16)]
CASES = [
    {"reduction": "all_reduce", "exchange": "dense"},
    {"reduction": "all_reduce", "exchange": "routed", "padding_idx": 5},
    {"reduction": "reduce_scatter", "exchange": "dense", "padding_idx": 5},
    {"reduction": "reduce_scatter", "exchange": "routed"},
]


def check(backend, cases, shapes=SHAPES, group=None, dynamic=None):
    from torch._dynamo.testing import CompileCounterWithBackend

    from torch_impl import ParallelVocabEmbedding

    for options in cases:
        torch._dynamo.reset()
        emb = ParallelVocabEmbedding(48, 6, process_group=group, **options)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(emb, fullgraph=True, backend=counter, dynamic=dynamic)
        for shape in shapes:
            ids = (torch.arange(shape[0] * shape[1]) * 7 - 2).view(shape)
            results = []
            for call in (emb, compiled):
                emb.weight.grad = None
                output = call(ids)
                output.sum().backward()
                results.append((output.detach(), emb.weight.grad))
            assert torch.equal(results[0][0], results[1][0]), (options, shape)
            assert torch.equal(results[0][1], results[1][1]), (options, shape)
        assert counter.frame_count <= 4, options


def test_one_rank():
    check("aot_eager", [{"padding_idx": 5}, {"reduction": "reduce_scatter"}])
    check("aot_eager", [{}], dynamic=True)


def check_in_a_group(*arguments):
    check(*arguments, group=dist.group.WORLD)


def test_two_ranks(world):
    world(2)(check_in_a_group, "aot_eager", CASES, SHAPES[:4])


@pytest.mark.slow
def test_two_ranks_with_inductor(world):
    world(2)(check_in_a_group, "inductor", CASES[2:3], SHAPES[:2])  # to a compiler the exchange is within an operator
