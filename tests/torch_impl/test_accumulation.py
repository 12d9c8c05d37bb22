"""Gradients that are added straight to where the parameter keeps them: the plain result, for the price of the tokens."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch_layers import DTYPES, MODES, assert_refused

from torch_impl import ParallelVocabEmbedding

FUSED = {"gradient_accumulation_fusion": True}


def plain_and_fused(*arguments, **options):
    return [ParallelVocabEmbedding(*arguments, **options, **more) for more in ({}, FUSED)]


def micro_batches(vocab_size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 9), (0,), (64,), ()]
    return [torch.randint(-3, vocab_size + 3, shape, generator=generator) for shape in shapes]


def backward(emb, ids, seed):
    output = emb(ids)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_gradient_as_the_plain_way(dtype):
    for padding_idx in (None, 13):
        plain, fused = plain_and_fused(40, 8, 1, 4, dtype=dtype, padding_idx=padding_idx)
        for seed, ids in enumerate(micro_batches(40)):
            for emb in (plain, fused):
                backward(emb, ids, seed)
            assert torch.equal(fused.weight.grad, plain.weight.grad)
        assert plain.weight.grad.count_nonzero() > 0
        assert fused.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_main_grad(dtype):
    plain, fused = plain_and_fused(40, 8, 1, 4, dtype=dtype)
    fused.weight.main_grad, fused.weight.grad_added_to_main_grad = torch.full((10, 8), 0.25), False
    expected = torch.full((10, 8), 0.25)
    for seed, ids in enumerate(micro_batches(40)):
        plain.weight.grad = None
        for emb in (plain, fused):
            backward(emb, ids, seed)
        expected.add_(plain.weight.grad)
    assert torch.equal(fused.weight.main_grad, expected)
    assert fused.weight.grad is None
    assert fused.weight.grad_added_to_main_grad is True  # Megatron's flag


@pytest.mark.parametrize(
    ("main_grad", "error"),
    [
        (torch.zeros(3, 4), ValueError),
        (torch.zeros(24, 4), ValueError),
        (torch.zeros(12, 3), ValueError),
        (torch.zeros(12, 4, dtype=torch.int32), ValueError),
        (torch.zeros(12, 4, dtype=torch.float16), ValueError),
        (torch.zeros(12, 4, device="meta"), ValueError),
        ([0.0], TypeError),
    ],
)
def test_a_main_grad_that_does_not_fit_is_refused(main_grad, error):
    for dtype in (torch.float32, torch.bfloat16):
        emb = ParallelVocabEmbedding(12, 4, dtype=dtype, **FUSED)
        emb.weight.main_grad = main_grad
        with pytest.raises(error, match="main_grad must be"):
            emb(torch.tensor([1, 5]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiler_leaves_it_to_eager_mode():
    torch._dynamo.reset()
    plain, fused = plain_and_fused(12, 4)
    for emb in (plain, fused):
        lookup = torch.compile(emb, backend="aot_eager")
        for ids in (torch.tensor([1, 2, 2]), torch.arange(12).repeat(100)):
            lookup(ids).sum().backward()
    assert torch.equal(plain.weight.grad, fused.weight.grad)


def test_two_uses_in_one_graph_and_training_steps_are_the_same():
    plain, fused = plain_and_fused(24, 4)
    for emb in (plain, fused):
        optimizer = torch.optim.AdamW(emb.parameters(), lr=0.1)
        for _step in range(3):
            optimizer.zero_grad()
            (emb(torch.tensor([1, 2, 2])).sum() + 2 * emb(torch.tensor([2, 5])).sum()).backward()
            for seed, ids in enumerate(micro_batches(24)):
                backward(emb, ids, seed)
            optimizer.step()
    assert torch.equal(fused.weight.grad, plain.weight.grad)
    assert torch.equal(fused.weight, plain.weight)


def allocated(emb, ids):
    """Bytes that a forward and backward allocate, a gradient being there already."""
    backward(emb, ids, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward(emb, ids, 0)
    return sum(max(0, event.self_cpu_memory_usage) for event in recorded.key_averages())


def test_a_step_costs_the_tokens_not_the_table():
    ids = torch.arange(64)
    small, large = (allocated(ParallelVocabEmbedding(v, 8, **FUSED), ids) for v in (1000, 100_000))
    assert small == large
    plain = allocated(ParallelVocabEmbedding(100_000, 8), ids)
    assert plain - large >= 100_000 * 8 * 4 - 64 * 8 * 4 * 4  # this can fail


def test_no_gradient_where_none_is_wanted():
    emb = ParallelVocabEmbedding(12, 4, **FUSED)
    with torch.no_grad():
        assert not emb(torch.tensor([1])).requires_grad
    emb.weight.requires_grad_(False)
    assert not emb(torch.tensor([1])).requires_grad
    assert "gradient_accumulation_fusion=True" in repr(emb)


def test_hooks_and_what_is_not_eager_are_refused():
    emb, ids = ParallelVocabEmbedding(12, 4, **FUSED), torch.tensor([1])
    torch._dynamo.reset()
    batch = torch.tensor([[1, 2], [5, 2]])
    mapped = torch.func.vmap(emb)(batch)
    assert torch.equal(mapped, emb.weight[batch])
    computed, output = {"weight": emb.weight * 2}, emb(ids).sum()
    assert_refused(
        (Exception, "eager mode only", lambda: torch.compile(emb, backend="eager", fullgraph=True)(ids)),
        (ValueError, "the table is computed", lambda: torch.func.functional_call(emb, computed, (ids,))),
        (ValueError, "differentiated again", lambda: torch.autograd.grad(output, emb.weight, create_graph=True)),
        (ValueError, "no gradient under torch.func.vmap", lambda: mapped.sum().backward()),
        (ValueError, "must be False with sparse=True", lambda: plain_and_fused(12, 4, sparse=True)),
    )
    assert emb.weight.grad is None
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        emb = ParallelVocabEmbedding(12, 4, **FUSED)
        getattr(emb.weight, hook)(lambda grad: None)
        with pytest.raises(ValueError, match="must be False here: the table has gradient hooks"):
            emb(ids)


def check_reductions():
    for reduction, exchange in MODES:
        options = {"process_group": dist.group.WORLD, "reduction": reduction, "exchange": exchange}
        plain, fused = plain_and_fused(48, 8, **options)
        for seed in range(3):
            ids = torch.randint(0, 48, (2, 8), generator=torch.Generator().manual_seed(seed))
            for emb in (plain, fused):
                backward(emb, ids, seed)
        assert torch.equal(fused.weight.grad, plain.weight.grad), (reduction, exchange)


def check_data_parallel():
    from torch.distributed.fsdp import fully_shard

    ids = torch.arange(12) * 5 % 24 + dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(ParallelVocabEmbedding(24, 4, **FUSED)))
        with pytest.raises(ValueError, match="DistributedDataParallel waits for the gradient"):
            wrapped(ids)
        gradients = []
        for emb in plain_and_fused(24, 4):
            model = nn.Sequential(emb, nn.Linear(4, 3, bias=False))
            nn.init.ones_(model[1].weight)
            model = fully_shard(model)
            for last in (False, True):
                model.set_requires_gradient_sync(last)
                model(ids).square().sum().backward()
            gradients.append(model[0].weight.grad.full_tensor())
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > 0


@pytest.mark.parametrize("check", [check_reductions, check_data_parallel])
def test_with_reductions_and_data_parallel_wrappers(world, check):
    world(2)(check)
