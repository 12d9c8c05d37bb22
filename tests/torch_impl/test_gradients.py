"""What only PyTorch's gradients have to answer: layouts, sparse ones, higher orders; and the order of the sums."""

import ml_dtypes
import numpy as np
import pytest
import torch

from shared.proof.oracle import weight_grad
from torch_impl import ParallelVocabEmbedding

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def as_numpy(tensor):
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def gradient(emb, ids, grad_output):
    emb.weight.grad = None
    emb(ids).backward(grad_output)
    return emb.weight.grad


def ranks(vocab_size, emb_size, world_size, **options):
    return [ParallelVocabEmbedding(vocab_size, emb_size, r, world_size, **options) for r in range(world_size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("emb_size", [6, 300])
def test_sums_run_in_the_order_of_the_tokens(dtype, emb_size):
    ids, grad_output = torch.randint(0, 12, (60,)), torch.randn(60, emb_size).to(dtype)
    for rank, emb in enumerate(ranks(12, emb_size, 3, dtype=dtype)):
        expected = weight_grad(as_numpy(grad_output), ids.numpy(), emb.partition, rank)
        np.testing.assert_array_equal(as_numpy(gradient(emb, ids, grad_output)), expected)


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
def test_gradcheck_first_and_second_order(rank, padding_idx):
    emb = ParallelVocabEmbedding(12, 2, rank, 3, dtype=torch.float64, padding_idx=padding_idx)
    weight = torch.randn(4, 2, dtype=torch.float64)
    if padding_idx is not None and rank == 1:
        weight[1] = 0
    ids = torch.tensor([[0, 5, 4], [11, 4, -1]])

    def lookup(weight):
        return torch.func.functional_call(emb, {"weight": weight}, (ids,))

    if padding_idx is None:  # a row without a gradient has none, though the output depends on it
        assert torch.autograd.gradcheck(lookup, (weight.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lookup, (weight.requires_grad_(),))


def test_gradients_to_the_third_order():
    emb = ParallelVocabEmbedding(12, 2, 1, 3, dtype=torch.float64)
    weight, ids = emb.weight.detach().requires_grad_(), torch.tensor([[0, 5, 4], [11, 5, -1]])

    def loss(lookup):
        value = lookup(weight).pow(4).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, weight, create_graph=True)
            value = grad.sum()
        return value

    def plain(weight):
        owned = (ids >= 4) & (ids < 8)
        return weight[(ids - 4).clamp(0, 3)] * owned.unsqueeze(-1)

    torch.testing.assert_close(loss(lambda w: torch.func.functional_call(emb, {"weight": w}, (ids,))), loss(plain))
