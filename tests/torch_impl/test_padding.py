"""Rows of padding: zero from the start, and without a gradient."""

import pytest
import torch
from torch_layers import equal_bits

from torch_impl import ParallelVocabEmbedding

IDS = torch.tensor([[0, 9, 10, 11], [2, 3, 3, -1], [12, 5, 9, 8]])  # 10 and 11 are in the padding, 12 is past it


def last_rank(**options):
    """Of 12 rows it holds the last three: one of the vocabulary, two of padding."""
    return ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, **options)


@pytest.mark.parametrize("init", ["per_rank", "global"])
def test_padding_is_zero_and_other_rows_are_those_of_an_unpadded_rank(init):
    options = {"init": init, "init_mean": 1.0}
    expected = ParallelVocabEmbedding(12, 4, 3, 4, **options).weight.detach().clone()
    expected[1:] = 0
    layer, late = last_rank(**options), last_rank(**options, device="meta")
    assert equal_bits(layer.weight, expected)
    assert (layer.vocab_size, layer.padded_vocab_size) == (10, 12)
    assert "padded_vocab_size=12" in repr(layer)
    for each in (layer, late.to_empty(device="cpu")):
        torch.nn.init.ones_(each.weight)
        each.reset_parameters()
        assert equal_bits(each.weight, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_of_the_callers_own(compiled):
    """It trains padding rows, and no others that it should not, unless their gradient is removed."""
    layer = last_rank(padding_idx=9)
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
    last_rank().zero_padding_grad()  # has no gradient
