"""Rows of padding: zero, no id's, without a gradient; and ranks that have nothing else."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from shared import VocabPartition, pad_vocab_size
from torch_impl import ParallelVocabEmbedding, partial_lookup

IDS = torch.tensor([[0, 9, 10, 11], [2, 3, 3, -1], [12, 5, 9, 8]])  # 10 and 11 are in the padding, 12 is past it


def ranks(vocab_size, world_size, padded, **options):
    return [
        ParallelVocabEmbedding(vocab_size, 4, r, world_size, padded_vocab_size=padded, **options)
        for r in range(world_size)
    ]


def whole_table(layers):
    return torch.cat([layer.weight[: np.subtract(*layer.partition.owned_range(layer.rank)[::-1])] for layer in layers])


@pytest.mark.parametrize(("world_size", "padded"), [(1, 10), (1, 12), (3, "even"), (4, "even"), (4, 24), (16, "even")])
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"padding_idx": 3}, {"init": "global"}])
def test_the_sum_is_the_unsharded_lookup(world_size, padded, options):
    layers = ranks(10, world_size, padded, **options)
    table = whole_table(layers).detach().requires_grad_()
    valid = (IDS >= 0) & (IDS < 10)
    expected = F.embedding(IDS * valid, table, options.get("padding_idx")) * valid.unsqueeze(-1)
    found = sum(layer(IDS) for layer in layers)
    assert torch.equal(found, expected)
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    expected.backward(upstream)
    for layer in layers:
        start, stop = layer.partition.owned_range(layer.rank)
        gradient = layer.weight.grad.to_dense()
        assert torch.equal(gradient[: stop - start], table.grad[start:stop])
        assert not gradient[stop - start :].any()


@pytest.mark.parametrize("init", ["per_rank", "global"])
def test_padding_is_zero_from_the_start_and_after_a_reset(init):
    layer = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, init=init, init_mean=1.0)
    assert (layer.vocab_size, layer.padded_vocab_size, layer.weight.shape) == (10, 12, (3, 4))
    assert layer.weight[0].all()
    assert not layer.weight[1:].any()
    torch.nn.init.ones_(layer.weight)
    layer.reset_parameters()
    assert not layer.weight[1:].any()
    assert "padded_vocab_size=12" in repr(layer)


def test_the_other_rows_are_those_of_an_unpadded_rank():
    layer = ParallelVocabEmbedding(10, 4, 1, 4, padded_vocab_size=12)
    assert torch.equal(layer.weight, ParallelVocabEmbedding(12, 4, 1, 4).weight)


def test_meta_then_to_empty_then_reset():
    layer = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, device="meta")
    layer.to_empty(device="cpu")
    layer.weight.detach().fill_(7)
    layer.reset_parameters()
    assert torch.equal(layer.weight, ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12).weight)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_padding_stays_zero_while_the_rest_is_trained(optimizer):
    layer = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12)
    options = {} if optimizer is not torch.optim.SGD else {"momentum": 0.9}
    steps = optimizer([layer.weight], lr=0.1, weight_decay=0.1, **options)
    before = layer.weight.detach().clone()
    for _ in range(5):
        steps.zero_grad()
        layer(IDS).square().sum().backward()
        steps.step()
    assert not torch.equal(layer.weight[0], before[0])
    assert not layer.weight[1:].any()


def test_an_id_in_the_padding_is_out_of_the_vocabulary():
    layer = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[1\] = 10 is outside the vocabulary \[0, 10\)"):
        layer(torch.tensor([9, 10]))
    torch.nn.init.ones_(layer.weight)  # whatever its rows hold
    lenient = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12)
    torch.nn.init.ones_(lenient.weight)
    assert not lenient(torch.tensor([10, 11])).any()
    assert not partial_lookup(layer.weight, torch.tensor([10, 11]), layer.partition, 3).any()
    assert layer(torch.tensor([9])).all()
    with pytest.raises(ValueError, match="padding_idx must be an id"):
        ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, padding_idx=10)


def test_compiled_too():
    layers = ranks(10, 4, "even")
    for layer in layers[-2:]:
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS), layer(IDS))


def check_reductions(dtype_name):
    """On each of 4 ranks, of which the last has padding only: every reduction is the unsharded lookup, in every bit."""
    dtype = getattr(torch, dtype_name)
    size = pad_vocab_size(9, 4, 16)
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.randint(-3, size + 3, (6, 8), generator=torch.Generator().manual_seed(1))
    valid = (ids >= 0) & (ids < 9)
    expected = F.embedding(ids * valid, table) * valid.unsqueeze(-1)
    upstream = torch.randint(-4, 5, expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradient = torch.zeros(size, 4).index_add_(
        0, (ids * valid).flatten(), (upstream * valid.unsqueeze(-1)).float().view(-1, 4)
    )
    for reduction in ("all_reduce", "reduce_scatter"):
        for exchange in ("dense", "routed"):
            layer = ParallelVocabEmbedding(
                9,
                4,
                process_group=dist.group.WORLD,
                dtype=dtype,
                reduction=reduction,
                exchange=exchange,
                padded_vocab_size=size,
                check=True,
            )
            start, stop = layer.partition.owned_range(layer.rank)
            with torch.no_grad():
                layer.weight[: stop - start] = table[start:stop]
            scattered = reduction == "reduce_scatter"
            chunk = slice(layer.rank * 2, layer.rank * 2 + 2) if scattered else slice(None)
            for module in (
                (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")) if exchange == "routed" else (layer,)
            ):
                layer.weight.grad = None
                output = module(ids)
                assert torch.equal(output, expected[:, chunk]), (reduction, exchange)
                output.backward(upstream[:, chunk])
                n = layer.partition.rows_per_rank
                assert torch.equal(layer.weight.grad, gradient[layer.rank * n : (layer.rank + 1) * n].to(dtype))
    return layer.partition == VocabPartition(9, 4, size)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_every_reduction_with_padding(world, dtype):
    assert world(4)(check_reductions, dtype) == [True] * 4


def check_disagreement():
    padded = 16 if dist.get_rank() == 1 else 12
    layer = ParallelVocabEmbedding(
        9, 4, process_group=dist.group.WORLD, reduction="all_reduce", padded_vocab_size=padded, check=True
    )
    try:
        layer(torch.arange(4))
    except ValueError as error:
        return str(error)


def test_ranks_that_pad_differently_are_told(world):
    for message in world(4)(check_disagreement):
        assert "the ranks disagree about padded_vocab_size: 12 on ranks 0, 2, 3; 16 on rank 1" in message


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_of_the_callers_own(compiled):
    """It trains padding rows, and no others that it should not, unless their gradient is removed."""
    layer = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, padding_idx=9)
    layer.weight.main_grad = torch.ones(3, 4)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1)

    def loss(hidden):
        return (layer(IDS).sum() + (hidden @ layer.weight.T).logsumexp(-1).sum()).square()

    (torch.compile(loss, backend="aot_eager") if compiled else loss)(torch.ones(2, 4)).backward()
    assert layer.weight.grad[1:].all()
    layer.zero_padding_grad()
    for gradient in (layer.weight.grad, layer.weight.main_grad):
        assert gradient[0].all()
        assert not gradient[1:].any()
    optimizer.step()
    assert layer.weight[0].all()
    assert not layer.weight[1:].any()
    ranks(10, 4, 12)[3].zero_padding_grad()  # has no gradient
