"""What only the PyTorch lookup has to answer: memory layouts, autocast, inference mode, its own refusals."""

import pytest
import torch
from torch_layers import assert_refused, looked_up, ranks_of

from shared import VocabPartition
from torch_impl import ParallelVocabEmbedding, partial_lookup, reduced_lookup


def test_ids_of_any_memory_layout_give_contiguous_rows():
    ids = torch.randint(0, 24, (6, 8))
    many = torch.arange(24).repeat(1000).reshape(2, -1).T
    for emb in ranks_of(24, 5, 3):
        for view in (ids.t(), ids[::2, 1::3], ids[0].expand(4, 8), many):
            for grad_mode in (True, False):
                with torch.set_grad_enabled(grad_mode):
                    assert torch.equal(emb(view), emb(view.contiguous()))
                    assert emb(view).is_contiguous()


def test_inference_mode_and_frozen_tables():
    emb, ids = ParallelVocabEmbedding(24, 5, 1, 3), torch.arange(24)
    with torch.inference_mode():
        assert torch.equal(emb(ids)[8:16], emb.weight)
    emb.weight.requires_grad_(False)
    assert not emb(ids).requires_grad


def test_the_pure_function_refuses_what_is_out_of_range():
    def look_up(**options):
        arguments = {"weight": torch.ones(8, 5), "ids": torch.tensor([0]), "partition": VocabPartition(24, 3)}
        return lambda: partial_lookup(**{**arguments, "rank": 0, **options})

    assert_refused(
        (ValueError, r"the rank's own rows, \[8, 5\], got \[24, 5\]", look_up(weight=torch.ones(24, 5))),
        (ValueError, "weight must have two dimensions", look_up(weight=torch.ones(8))),
        (TypeError, "weight must be of a floating dtype", look_up(weight=torch.ones(8, 5, dtype=torch.int64))),
        (ValueError, "invalid_ids must be", look_up(invalid_ids="wrap")),
        (ValueError, "padding_idx must be", look_up(padding_idx=24)),
        (TypeError, "sparse must be True or False", look_up(sparse=1)),
        (ValueError, "rank must be in", look_up(rank=3)),
        (TypeError, "rank must be an integer, got 1.5", look_up(rank=1.5)),
        (TypeError, "rank must be an integer", look_up(rank=torch.tensor(1.0))),
        (TypeError, "ids must be a torch.Tensor of an integer dtype, got list", look_up(ids=[1, 2])),
    )


def test_the_pure_functions_take_tables_that_no_layer_holds():
    table, ids, halves = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 3]), VocabPartition(4, 2)
    assert partial_lookup(table[2:].to(torch.float8_e4m3fn), ids, halves, 1).float().tolist() == [[0, 0], [6, 7]]
    assert partial_lookup(table[:, ::2][2:], ids, halves, 1).tolist() == [[0], [6]]
    alone = reduced_lookup(table, ids, VocabPartition(4, 1), None, reduction="all_reduce")
    assert alone.tolist() == [[0, 1], [6, 7]]
    with pytest.raises(TypeError, match="dtype must be float16"):
        reduced_lookup(table.to(torch.float8_e4m3fn), ids, VocabPartition(4, 1), None, reduction="all_reduce")


@pytest.mark.parametrize("moved", [False, True])
def test_a_large_batch_is_the_same(moved):
    """From 32 MiB on the output lies in other memory."""
    ids = (torch.arange(9000) * 7 % 50).view(9, -1)
    emb = ParallelVocabEmbedding(48, 1024, 1, 3, padding_idx=17)
    emb.weight.data = emb.weight.data.clone() if moved else emb.weight.data
    expected = looked_up(emb.weight.detach(), ids, 16)
    with torch.no_grad():
        assert torch.equal(emb(ids), expected)
    output = emb(ids)
    assert torch.equal(output, expected)
    output.backward(torch.ones_like(output))
    counts = ids.flatten().bincount(minlength=50)[16:32].float()
    counts[1] = 0
    assert torch.equal(emb.weight.grad, counts[:, None].expand(16, 1024))
