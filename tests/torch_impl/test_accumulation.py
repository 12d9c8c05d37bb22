"""Gradients that are added straight to where the parameter keeps them: the plain result, for the price of the tokens."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch_layers import DTYPES, allocated, assert_refused, function_of, on_ranks, without_warnings

from torch_impl import ParallelVocabEmbedding

FUSED = {"gradient_accumulation_fusion": True}


def plain_and_fused(*arguments, **options):
    return [ParallelVocabEmbedding(*arguments, **options, **more) for more in ({}, FUSED)]


def backward(emb, ids, seed=0):
    output = emb(ids)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 13])
def test_micro_batches_are_summed_in_grad_or_main_grad(dtype, padding_idx):
    options = {"dtype": dtype, "padding_idx": padding_idx}
    plain, fused = plain_and_fused(40, 8, 1, 4, **options)
    buffered = ParallelVocabEmbedding(40, 8, 1, 4, **options, **FUSED)
    buffered.weight.main_grad, buffered.weight.grad_added_to_main_grad = torch.full((10, 8), 0.25), False
    grad, main_grad = torch.zeros(10, 8, dtype=dtype), torch.full((10, 8), 0.25)
    for seed, shape in enumerate([(2, 9), (0,), (64,), ()]):
        ids = torch.randint(-3, 43, shape)
        plain.weight.grad = None
        for emb in (plain, fused, buffered):
            backward(emb, ids, seed)
        for found, total in ((fused.weight.grad, grad), (buffered.weight.main_grad, main_grad)):
            assert torch.equal(found, total.add_(plain.weight.grad))
            assert found.dtype == total.dtype
    assert grad.count_nonzero() > 0
    assert buffered.weight.grad is None
    assert buffered.weight.grad_added_to_main_grad is True  # Megatron's flag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_main_grad_that_does_not_fit_is_refused(dtype):
    emb = ParallelVocabEmbedding(12, 4, dtype=dtype, **FUSED)

    def look_up(main_grad):
        emb.weight.main_grad = main_grad
        emb(torch.tensor([1, 5]))

    assert_refused(
        (ValueError, r"main_grad must be \(12, 4\) on cpu, .* got \(12, 3\)", lambda: look_up(torch.zeros(12, 3))),
        (ValueError, "float32 or wider; got .* torch.int32", lambda: look_up(torch.zeros(12, 4, dtype=torch.int32))),
        (ValueError, "torch.float16", lambda: look_up(torch.zeros(12, 4, dtype=torch.float16))),
        (ValueError, "on meta", lambda: look_up(torch.zeros(12, 4, device="meta"))),
        (TypeError, "main_grad must be a tensor like the table, got list", lambda: look_up([0.0])),
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiler_leaves_it_to_eager_mode():
    torch._dynamo.reset()
    plain, fused = plain_and_fused(12, 4)
    for emb in (plain, fused):
        lookup = torch.compile(emb, backend="aot_eager")
        for ids in (torch.tensor([1, 2, 2]), torch.arange(12).repeat(100)):
            lookup(ids).sum().backward()
    assert torch.equal(plain.weight.grad, fused.weight.grad)


def test_two_uses_in_one_graph():
    plain, fused = plain_and_fused(24, 4)
    for emb in (plain, fused):
        (emb(torch.tensor([1, 2, 2])).sum() + 2 * emb(torch.tensor([2, 5])).sum()).backward()
    assert torch.equal(fused.weight.grad, plain.weight.grad)


def test_a_step_costs_the_tokens_not_the_table():
    ids, taken = torch.arange(64), []
    for vocab_size, options in ((1000, FUSED), (100_000, FUSED), (100_000, {})):
        emb = ParallelVocabEmbedding(vocab_size, 8, **options)
        backward(emb, ids)  # a gradient is there already
        taken.append(allocated(backward, emb, ids))
    small, large, plain = taken
    assert small == large
    assert plain - large >= 100_000 * 8 * 4 - 64 * 8 * 4 * 4  # this can fail


def test_no_gradient_where_none_is_wanted():
    emb = ParallelVocabEmbedding(12, 4, **FUSED)
    with torch.no_grad():
        assert not emb(torch.tensor([1])).requires_grad
    emb.weight.requires_grad_(False)
    assert not emb(torch.tensor([1])).requires_grad


def test_hooks_and_what_is_not_eager_are_refused():
    emb, ids = ParallelVocabEmbedding(12, 4, **FUSED), torch.tensor([1])
    torch._dynamo.reset()
    batch = torch.tensor([[1, 2], [5, 2]])
    mapped = torch.func.vmap(emb)(batch)
    assert torch.equal(mapped, emb.weight[batch])
    output = emb(ids).sum()
    assert_refused(
        (Exception, "eager mode only", lambda: torch.compile(emb, backend="eager", fullgraph=True)(ids)),
        (ValueError, "the table is computed", lambda: function_of(emb)(emb.weight * 2, ids)),
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


@on_ranks(2)
@without_warnings()
def test_ddp_is_refused_and_fully_shard_works():
    from torch.distributed.fsdp import fully_shard

    ids = torch.arange(12) * 5 % 24 + dist.get_rank()
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
