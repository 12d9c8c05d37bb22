"""Gradients that are added straight to where the parameter keeps them: the plain result, for the price of the tokens."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_impl import ParallelVocabEmbedding

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUSED = {"gradient_accumulation_fusion": True}


def micro_batches(vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 9), (0,), (64,), ()]
    return [torch.randint(-3, vocab_size + 3, shape, generator=generator) for shape in shapes]


def backward(emb, ids, seed):
    output = emb(ids)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 13])
def test_the_same_gradient_as_the_plain_way(dtype, padding_idx):
    plain, fused = (
        ParallelVocabEmbedding(40, 8, 1, 4, dtype=dtype, padding_idx=padding_idx, **options) for options in ({}, FUSED)
    )
    for seed, ids in enumerate(micro_batches(40)):
        for emb in (plain, fused):
            backward(emb, ids, seed)
        assert torch.equal(fused.weight.grad, plain.weight.grad)
    assert plain.weight.grad.count_nonzero() > 0
    assert fused.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_main_grad(dtype):
    plain, fused = (ParallelVocabEmbedding(40, 8, 1, 4, dtype=dtype, **options) for options in ({}, FUSED))
    fused.weight.main_grad = torch.full((10, 8), 0.25)
    expected = torch.full((10, 8), 0.25)
    for seed, ids in enumerate(micro_batches(40)):
        plain.weight.grad = None
        for emb in (plain, fused):
            backward(emb, ids, seed)
        expected.add_(plain.weight.grad)
    assert torch.equal(fused.weight.main_grad, expected)
    assert fused.weight.grad is None


def test_a_main_grad_of_the_other_16_bit_dtype_is_refused():
    emb = ParallelVocabEmbedding(12, 4, dtype=torch.bfloat16, **FUSED)
    emb.weight.main_grad = torch.zeros(12, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="main_grad must be"):
        emb(torch.tensor([1, 5]))


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
    emb = ParallelVocabEmbedding(12, 4, **FUSED)
    emb.weight.main_grad = main_grad
    with pytest.raises(error, match="main_grad must be"):
        emb(torch.tensor([1, 5]))


def test_megatrons_flag_is_set():
    emb = ParallelVocabEmbedding(12, 4, **FUSED)
    emb.weight.main_grad, emb.weight.grad_added_to_main_grad = torch.zeros(12, 4), False
    emb(torch.tensor([1])).sum().backward()
    assert emb.weight.grad_added_to_main_grad is True


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiler_leaves_it_to_eager_mode():
    torch._dynamo.reset()
    gradients = []
    for options in ({}, FUSED):
        emb = ParallelVocabEmbedding(12, 4, **options)
        lookup = torch.compile(emb, backend="aot_eager")
        for ids in (torch.tensor([1, 2, 2]), torch.arange(12).repeat(100)):
            lookup(ids).sum().backward()
        gradients.append(emb.weight.grad)
    assert torch.equal(*gradients)


def test_mapped_over_ids_there_is_no_gradient():
    emb, ids = ParallelVocabEmbedding(12, 4, **FUSED), torch.tensor([[1, 2, 2], [5, 2, 11]])
    output = torch.func.vmap(emb)(ids)
    assert torch.equal(output, emb.weight[ids])
    with pytest.raises(ValueError, match=r"no gradient under torch.func.vmap"):
        output.sum().backward()


def test_two_uses_in_one_graph():
    plain, fused = (ParallelVocabEmbedding(12, 4, **options) for options in ({}, FUSED))
    for emb in (plain, fused):
        (emb(torch.tensor([1, 2, 2])).sum() + 2 * emb(torch.tensor([2, 5])).sum()).backward()
    assert torch.equal(fused.weight.grad, plain.weight.grad)


def test_a_training_step_is_the_same():
    tables = []
    for options in ({}, FUSED):
        emb = ParallelVocabEmbedding(24, 4, **options)
        optimizer = torch.optim.AdamW(emb.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            for seed, ids in enumerate(micro_batches(24, step)):
                backward(emb, ids, seed)
            optimizer.step()
        tables.append(emb.weight.detach())
    assert torch.equal(*tables)


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


def with_hook(emb):
    emb.weight.register_hook(lambda grad: grad)


def with_hook_afterwards(emb):
    emb.weight.register_post_accumulate_grad_hook(lambda parameter: None)


@pytest.mark.parametrize("prepare", [with_hook, with_hook_afterwards])
def test_hooks_are_refused(prepare):
    emb = ParallelVocabEmbedding(12, 4, **FUSED)
    prepare(emb)
    with pytest.raises(ValueError, match="must be False here: the table has gradient hooks"):
        emb(torch.tensor([1]))


def test_what_is_not_eager_is_refused():
    emb, ids = ParallelVocabEmbedding(12, 4, **FUSED), torch.tensor([1])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="eager mode only"):
        torch.compile(emb, backend="eager", fullgraph=True)(ids)
    with pytest.raises(ValueError, match="the table is computed"):
        torch.func.functional_call(emb, {"weight": emb.weight * 2}, (ids,))
    with pytest.raises(ValueError, match="differentiated again"):
        torch.autograd.grad(emb(ids).sum(), emb.weight, create_graph=True)
    with pytest.raises(ValueError, match="must be False with sparse=True"):
        ParallelVocabEmbedding(12, 4, sparse=True, **FUSED)
    assert emb.weight.grad is None


def check_reductions():
    group = dist.group.WORLD
    for reduction in ("all_reduce", "reduce_scatter"):
        for exchange in ("dense", "routed"):
            options = {"process_group": group, "reduction": reduction, "exchange": exchange}
            plain, fused = (ParallelVocabEmbedding(48, 8, **options, **more) for more in ({}, FUSED))
            for seed in range(3):
                ids = torch.randint(0, 48, (2, 8), generator=torch.Generator().manual_seed(seed))
                for emb in (plain, fused):
                    backward(emb, ids, seed)
            assert torch.equal(fused.weight.grad, plain.weight.grad), (reduction, exchange)


def test_with_reductions(world):
    world(2)(check_reductions)


def check_data_parallel():
    from torch.distributed.fsdp import fully_shard

    ids = torch.arange(12) * 5 % 24 + dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(ParallelVocabEmbedding(24, 4, **FUSED)))
        with pytest.raises(ValueError, match="DistributedDataParallel waits for the gradient"):
            wrapped(ids)
        gradients = []
        for options in ({}, FUSED):
            model = nn.Sequential(ParallelVocabEmbedding(24, 4, **options), nn.Linear(4, 3, bias=False))
            nn.init.ones_(model[1].weight)
            model = fully_shard(model)
            for last in (False, True):
                model.set_requires_gradient_sync(last)
                model(ids).square().sum().backward()
            gradients.append(model[0].weight.grad.full_tensor())
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > 0


def test_under_data_parallel_wrappers(world):
    world(2)(check_data_parallel)
