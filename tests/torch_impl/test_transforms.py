"""Under torch.compile, torch.export, torch.func, checkpointing and fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from shared import VocabPartition
from torch_impl import ParallelVocabEmbedding, partial_lookup


@pytest.fixture(autouse=True)
def _forget_compiled_graphs():
    torch._dynamo.reset()


IDS = torch.tensor([[0, 5, 4, 12], [11, 5, -1, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "padding_idx"), [(0, None), (1, None), (1, 5)])
def test_compiled_forward_and_backward_are_one_graph(dtype, rank, padding_idx):
    emb = ParallelVocabEmbedding(12, 4, rank, 3, dtype=dtype, padding_idx=padding_idx)
    compiled = torch.compile(emb, fullgraph=True)
    eager, traced = emb(IDS), compiled(IDS)
    assert torch.equal(traced.view(torch.uint8), eager.view(torch.uint8))
    grad_output = torch.randint(-7, 8, eager.shape).to(dtype)
    (expected,) = torch.autograd.grad(eager, emb.weight, grad_output)
    (found,) = torch.autograd.grad(traced, emb.weight, grad_output)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding_idx", [None, 5])
def test_compiled_graphs_are_the_same_on_every_rank(padding_idx):
    counter = CompileCounterWithBackend("aot_eager")
    for rank in range(12):
        emb = ParallelVocabEmbedding(12, 4, rank, 12, padding_idx=padding_idx)
        out = torch.compile(emb, fullgraph=True, backend=counter)(IDS)
        assert torch.equal(out, emb(IDS))
        out.sum().backward()
    assert counter.frame_count == 1


def test_compiled_gradients_of_16_bit_tables_do_not_saturate():
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=torch.bfloat16)
    torch.compile(emb, fullgraph=True)(torch.full((5000,), 6)).sum().backward()
    assert torch.equal(emb.weight.grad[2], torch.full((4,), 5000.0).bfloat16())


def test_compiled_errors_are_the_eager_ones():
    emb = ParallelVocabEmbedding(12, 4, 1, 3, invalid_ids="error")
    compiled = torch.compile(emb, fullgraph=True)
    assert torch.equal(compiled(IDS.clamp(0, 11)), emb(IDS.clamp(0, 11)))
    with pytest.raises(IndexError, match=r"ids\[0, 3\] = 12 is outside the vocabulary \[0, 12\)"):
        compiled(IDS)


def test_compiled_with_any_number_of_ids():
    emb = ParallelVocabEmbedding(12, 4, 1, 3)
    compiled = torch.compile(emb, fullgraph=True, dynamic=True)
    for size in (1, 2, 5, 9):
        ids = torch.randint(0, 12, (size,))
        assert torch.equal(compiled(ids), emb(ids))


def test_compiled_sparse_gradients_are_refused():
    emb = ParallelVocabEmbedding(12, 4, 1, 3, sparse=True)
    compiled = torch.compile(emb, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS), emb(IDS))
    with pytest.raises(Exception, match="cannot be compiled: use the dense gradient"):
        compiled(IDS)


def test_exported():
    emb = ParallelVocabEmbedding(12, 4, 1, 3)
    exported = torch.export.export(emb, (IDS,)).module()
    assert torch.equal(exported(IDS), emb(IDS))


def test_checkpointed():
    emb = ParallelVocabEmbedding(12, 4, 1, 3)
    emb(IDS).square().sum().backward()
    expected, emb.weight.grad = emb.weight.grad, None
    checkpoint(emb, IDS, use_reentrant=False).square().sum().backward()
    assert torch.equal(emb.weight.grad, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_mapped_over_ids_tables_and_both(sparse):
    emb = ParallelVocabEmbedding(12, 4, 1, 3, sparse=sparse, padding_idx=5)
    table = emb.weight.detach()
    tables = torch.stack([table, 2 * table])

    def lookup(weight, ids):
        return functional_call(emb, {"weight": weight}, (ids,))

    assert torch.equal(vmap(lookup, (None, 0))(table, IDS), emb(IDS))
    assert torch.equal(vmap(lookup, (None, 1), 1)(table, IDS), emb(IDS))
    assert torch.equal(vmap(lookup, (0, None))(tables, IDS), torch.stack([emb(IDS), 2 * emb(IDS)]))
    assert torch.equal(vmap(lookup, (0, 0))(tables, IDS), torch.stack([emb(IDS[0]), 2 * emb(IDS[1])]))


def test_per_sample_gradients():
    emb = ParallelVocabEmbedding(12, 4, 1, 3, padding_idx=5)
    table = emb.weight.detach()

    def loss(weight, ids):
        return functional_call(emb, {"weight": weight}, (ids,)).pow(3).sum()

    expected = torch.stack([grad(loss)(table, ids) for ids in IDS])
    assert torch.equal(vmap(grad(loss), (None, 0))(table, IDS), expected)
    assert torch.equal(vmap(grad(loss), (0, 0))(torch.stack([table, table]), IDS), expected)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "grad of vmap", "jacrev", "vmap"])
def test_compiled_transforms(backend, padding_idx, transform):
    """The loss is linear in the rows: what a foreign id leaves behind would show. Sums are of integers, hence exact."""
    partition, weights = VocabPartition(12, 3), torch.randint(-9, 10, (2, 4, 4)).float()
    factors = torch.randint(-9, 10, (*IDS.shape, 4)).float()

    def loss(weight, ids):
        return (partial_lookup(weight, ids, partition, 1, padding_idx=padding_idx) * factors).sum()

    def function(weights, ids):
        if transform == "grad":
            return grad(loss)(weights[0], ids)
        if transform == "vmap of grad":
            return vmap(grad(loss), (0, None))(weights, ids)
        if transform == "grad of vmap":
            return grad(lambda weights: vmap(loss, (0, None))(weights, ids).sum())(weights)
        if transform == "jacrev":
            return torch.func.jacrev(lambda weight: partial_lookup(weight, ids, partition, 1))(weights[0])
        return vmap(loss, (0, None))(weights, ids)

    expected = function(weights, IDS)
    assert torch.equal(torch.compile(function, fullgraph=True, backend=backend)(weights, IDS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_rows_are_bits(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(2, 32768)
    emb = ParallelVocabEmbedding(4, 32768, 0, 2, dtype=dtype)
    with torch.no_grad():
        emb.weight.copy_(every.view(dtype))
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode):
            found = torch.compile(emb, fullgraph=True)(torch.tensor([0, 1, 2, -1])).detach().view(torch.int16)
        assert torch.equal(found[:2], every)
        assert not found[2:].any()


def test_forward_mode_is_refused():
    partition, weight = VocabPartition(12, 3), torch.randn(4, 4)
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode), pytest.raises(NotImplementedError):
            torch.func.jvp(lambda weight: partial_lookup(weight, IDS, partition, 1), (weight,), (weight,))


def test_exported_for_any_number_of_ids():
    emb = ParallelVocabEmbedding(12, 4, 1, 3)
    exported = torch.export.export(emb, (IDS[0],), dynamic_shapes=({0: torch.export.Dim("tokens")},)).module()
    for tokens in (2, 7, 3000):
        ids = torch.arange(tokens)
        assert torch.equal(exported(ids), emb(ids))


def test_jacobian():
    emb = ParallelVocabEmbedding(12, 2, 1, 3, dtype=torch.float64)
    table = emb.weight.detach()

    def plain(weight):
        owned = (IDS >= 4) & (IDS < 8)
        return weight[(IDS - 4).clamp(0, 3)] * owned.unsqueeze(-1)

    found = torch.func.jacrev(lambda weight: functional_call(emb, {"weight": weight}, (IDS,)))(table)
    assert torch.equal(found, torch.func.jacrev(plain)(table))


@pytest.mark.parametrize("batched", ["ids", "table", "both"])
def test_mapped_over_a_large_batch(batched):
    """From 32 MiB on rows are copied by an operator."""
    emb = ParallelVocabEmbedding(12, 1024, 1, 3)
    ids = (torch.arange(9000) * 5 % 14).view(2, -1)
    tables = torch.stack([emb.weight.detach(), 2 * emb.weight.detach()])
    in_dims = {"ids": (None, 0), "table": (0, None), "both": (0, 0)}[batched]
    arguments = (
        tables[0] if batched == "ids" else tables,
        ids[0].repeat(2) if batched == "table" else ids.repeat(1, 2),
    )
    found = vmap(lambda weight, ids: functional_call(emb, {"weight": weight}, (ids,)), in_dims)(*arguments)
    for i in range(2):
        table, mine = (a if dim is None else a[i] for a, dim in zip(arguments, in_dims, strict=True))
        assert torch.equal(found[i], functional_call(emb, {"weight": table}, (mine,)))


def test_fake_tensors_have_the_right_shapes():
    with FakeTensorMode():
        emb = ParallelVocabEmbedding(12, 4, 1, 3, dtype=torch.bfloat16)
        out = emb(torch.zeros(2, 5, dtype=torch.int32))
        out.sum().backward()
        assert (out.shape, out.dtype, emb.weight.grad.shape) == ((2, 5, 4), torch.bfloat16, (4, 4))
