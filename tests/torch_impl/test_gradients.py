"""Gradients, against torch's own on the whole table and against the NumPy oracle.

Where the terms are integers small enough, sums are exact in any order and bits are compared. Elsewhere the two sums
differ by rounding: each of k additions errs by at most eps / 2 of a partial sum, hence rtol = k * eps with k = 60 tokens.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.oracle import weight_grad
from torch_impl import ParallelVocabEmbedding

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True, params=["by size", "no graph of PyTorch's own", "sorted"])
def way(request, monkeypatch):
    """Small batches take shorter ways: here all of them take each."""
    if request.param != "by size":
        monkeypatch.setattr("torch_impl.rows._FEW_BYTES", 0)
    if request.param == "sorted":
        monkeypatch.setattr("torch_impl.local.sums._SMALL_TOKENS", 0)


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def gradient(emb, ids, grad_output):
    emb.weight.grad = None
    emb(ids).backward(grad_output)
    return emb.weight.grad


def ranks(vocab_size, emb_size, world_size, **options):
    return [ParallelVocabEmbedding(vocab_size, emb_size, r, world_size, **options) for r in range(world_size)]


@pytest.mark.parametrize("equal", [1, 2, 64])
def test_few_equal_ids_do_not_saturate_either(equal):
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=torch.bfloat16)
    grad_output = torch.ones(equal + 2, 4, dtype=torch.bfloat16)
    grad_output[1] = 256
    found = gradient(emb, torch.tensor([0, *[5] * equal, 9]), grad_output)
    expected = torch.zeros(4, 4, dtype=torch.bfloat16)
    expected[1] = 255.0 + equal
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("padding_idx", [None, 0, 17])
def test_exact_sums_are_the_oracles(dtype, world_size, padding_idx):
    ids = torch.cat([torch.arange(-2, 50), torch.randint(0, 48, (500,)), torch.full((300,), 17)])
    grad_output = torch.randint(-7, 8, (len(ids), 6)).to(dtype)
    for rank, emb in enumerate(ranks(48, 6, world_size, dtype=dtype, padding_idx=padding_idx)):
        expected = weight_grad(as_numpy(grad_output), ids.numpy(), emb.partition, rank, padding_idx)
        np.testing.assert_array_equal(as_numpy(gradient(emb, ids, grad_output)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sums_are_close_to_torchs_own_and_equal_to_the_oracles(dtype):
    ids, grad_output = torch.randint(0, 12, (60,)), torch.randn(60, 6).to(dtype)
    modules = ranks(12, 6, 3, dtype=dtype)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    table = torch.cat([emb.weight.detach() for emb in modules]).to(wide).requires_grad_()
    F.embedding(ids, table).backward(grad_output.to(wide))
    whole = torch.cat([gradient(emb, ids, grad_output) for emb in modules])
    rounding = 60 * torch.finfo(wide).eps + (torch.finfo(dtype).eps if wide != dtype else 0)
    torch.testing.assert_close(whole.to(wide), table.grad, rtol=rounding, atol=rounding)
    for rank, emb in enumerate(modules):
        expected = weight_grad(as_numpy(grad_output), ids.numpy(), emb.partition, rank)
        np.testing.assert_array_equal(as_numpy(emb.weight.grad), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_5000_equal_ids_do_not_saturate(dtype):
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=dtype)
    grad = gradient(emb, torch.full((5000,), 6), torch.ones(5000, 4, dtype=dtype))
    assert torch.equal(grad[2], torch.full((4,), 5000.0).to(dtype))
    assert not grad[[0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_round_to_even(dtype):
    halfway = 2.0 ** (1 - math.log2(torch.finfo(dtype).eps))
    emb = ParallelVocabEmbedding(2, 8, dtype=dtype)
    for base in (halfway, halfway + 2):
        terms = torch.tensor([base, 1.0]).to(dtype).unsqueeze(1).expand(2, 8)
        expected = (terms[0].float() + terms[1].float()).to(dtype)
        assert torch.equal(gradient(emb, torch.tensor([0, 0]), terms)[0], expected)


def test_not_a_number_reaches_only_the_row_that_was_asked_for():
    modules = ranks(12, 3, 3)
    ids = torch.tensor([0, 4, 5, 4, -1, 12])
    grad_output = torch.ones(6, 3)
    grad_output[1] = float("nan")
    grad_output[4] = float("inf")
    grads = torch.cat([gradient(emb, ids, grad_output) for emb in modules])
    assert grads[4].isnan().all()
    assert grads[[0, 5]].eq(1).all()
    assert not grads[[i for i in range(12) if i not in (0, 4, 5)]].any()


def test_gradients_of_any_memory_layout():
    ids = torch.randint(0, 12, (5, 4))
    for emb in ranks(12, 3, 3):
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
    for rank in range(3):
        dense, sparse = (
            gradient(
                ParallelVocabEmbedding(48, 6, rank, 3, dtype=dtype, padding_idx=padding_idx, sparse=kind),
                ids,
                grad_output,
            )
            for kind in (False, True)
        )
        assert sparse.is_sparse
        assert torch.equal(sparse.to_dense(), dense)
        assert torch.equal(sparse._indices()[0], sparse._indices()[0].unique())


def test_a_sparse_gradient_holds_only_the_rows_asked_for():
    emb = ParallelVocabEmbedding(2**20, 4, 0, 2, sparse=True)
    emb(torch.tensor([7, 7, 9, 2**20 - 1])).sum().backward()
    assert emb.weight.grad._indices().tolist() == [[7, 9]]
    assert emb.weight.grad._values()[:, 0].tolist() == [2, 1]
    empty = gradient(emb, torch.tensor([2**20 - 1]), torch.ones(1, 4))
    assert empty._values().shape == (0, 4)
    torch.optim.SparseAdam(emb.parameters()).step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_follows_the_unsharded_embedding(optimizer):
    modules = ranks(12, 4, 3, dtype=torch.float64)
    whole = torch.nn.Embedding.from_pretrained(torch.cat([m.weight.detach() for m in modules]), freeze=False)
    steps = [optimizer(m.parameters(), lr=0.1) for m in [*modules, whole]]
    for _ in range(10):
        ids = torch.randint(0, 12, (30,))
        losses = [(out - 1).square().sum() for out in (sum(m(ids) for m in modules), whole(ids))]
        assert losses[0] == losses[1]
        for step in steps:
            step.zero_grad()
        sum(losses).backward()
        for step in steps:
            step.step()


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_gradcheck_first_and_second_order_and_forward_mode(rank, padding_idx):
    emb = ParallelVocabEmbedding(12, 2, rank, 3, dtype=torch.float64)
    ids = torch.tensor([[0, 5, 4], [11, 5, -1]])

    def lookup(weight):
        return torch.func.functional_call(emb, {"weight": weight}, (ids,))

    assert torch.autograd.gradcheck(lookup, (emb.weight,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lookup, (emb.weight,), check_fwd_over_rev=True)
    if padding_idx is not None:
        emb.padding_idx = padding_idx
        out, tangent = torch.func.jvp(lookup, (emb.weight.detach(),), (torch.ones_like(emb.weight),))
        expected = emb.partition.owns(ids, rank) & (ids != padding_idx)
        assert torch.equal(tangent, expected.unsqueeze(-1).expand_as(out).double())
