"""What only PyTorch's gradients have to answer: layouts, sparse ones, higher orders; and the order of the sums."""

import numpy as np
import pytest
import torch
from torch_layers import DTYPES, array_of, looked_up, ranks_of

from shared.proof.oracle import weight_grad
from torch_impl import ParallelVocabEmbedding


def gradient(emb, ids, grad_output):
    emb.weight.grad = None
    emb(ids).backward(grad_output)
    return emb.weight.grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_run_in_the_order_of_the_tokens(dtype):
    for emb_size in (6, 300):
        ids, grad_output = torch.randint(0, 12, (60,)), torch.randn(60, emb_size).to(dtype)
        for emb in ranks_of(12, emb_size, 3, dtype=dtype):
            expected = weight_grad(array_of(grad_output), ids.numpy(), emb.partition, emb.rank)
            np.testing.assert_array_equal(array_of(gradient(emb, ids, grad_output)), expected)


def test_a_large_gradient():
    """From 32 MiB on it lies in mapped memory."""
    emb = ParallelVocabEmbedding(2**18, 64, 1, 2, init=None)
    grad = gradient(emb, torch.tensor([2**17 + 5, 2**18 - 1, 3, 2**17 + 5]), torch.ones(4, 64))
    assert grad[[5, -1], 0].tolist() == [2, 1]
    assert grad.count_nonzero() == 2 * 64


def test_gradients_of_any_memory_layout():
    ids = torch.randint(0, 12, (5, 4))
    for emb in ranks_of(12, 3, 3):
        emb(ids).sum().backward()
        counts = torch.bincount(ids.flatten(), minlength=12)[emb.partition.start(emb.rank) :][:4]
        assert torch.equal(emb.weight.grad, counts[:, None].expand(4, 3).float())
        transposed = torch.randn(3, 4, 5).permute(2, 1, 0)
        assert torch.equal(gradient(emb, ids, transposed), gradient(emb, ids, transposed.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 17])
def test_sparse_gradients_are_the_dense_ones(dtype, padding_idx):
    ids = torch.cat([torch.arange(-2, 50), torch.randint(0, 48, (500,))])
    grad_output = torch.randn(len(ids), 6).to(dtype)
    layers = (ranks_of(48, 6, 3, sparse=sparse, dtype=dtype, padding_idx=padding_idx) for sparse in (True, False))
    for each in zip(*layers, strict=True):
        sparse, dense = (gradient(emb, ids, grad_output) for emb in each)
        assert sparse.is_sparse
        assert torch.equal(sparse.to_dense(), dense)
        assert torch.equal(sparse._indices()[0], sparse._indices()[0].unique())


def test_a_sparse_gradient_holds_only_the_rows_asked_for():
    emb = ParallelVocabEmbedding(2**20, 4, 0, 2, sparse=True)
    found = gradient(emb, torch.tensor([7, 7, 9, 2**20 - 1]), torch.ones(4, 4))
    assert found._indices().tolist() == [[7, 9]]
    assert found._values()[:, 0].tolist() == [2, 1]
    torch.optim.SparseAdam(emb.parameters()).step()
    assert gradient(emb, torch.tensor([2**20 - 1]), torch.ones(1, 4))._values().shape == (0, 4)
    torch.optim.SparseAdam(emb.parameters()).step()


@pytest.mark.parametrize("padding_idx", [None, 5])
def test_gradients_to_the_third_order(padding_idx):
    ids = torch.tensor([[0, 5, 4], [11, 5, -1]])
    for emb in ranks_of(12, 2, 3, dtype=torch.float64, padding_idx=padding_idx):
        torch.nn.init.normal_(emb.weight)  # the row of padding_idx is looked up too
        rows = looked_up(emb.weight, ids, emb.partition.start(emb.rank))
        if padding_idx is not None:
            rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
        value, expected = emb(ids).pow(4).sum(), rows.pow(4).sum()
        for _order in range(3):
            found, wanted = (torch.autograd.grad(each, emb.weight, create_graph=True)[0] for each in (value, expected))
            torch.testing.assert_close(found, wanted)
            value, expected = found.pow(2).sum(), wanted.pow(2).sum()
