"""Under torch.compile, torch.export, torch.func and fake tensors."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch_layers import assert_compiled_is_the_same, function_of, looked_up

from shared import VocabPartition
from torch_impl import ParallelVocabEmbedding, partial_lookup


@pytest.fixture(autouse=True)
def _forget_compiled_graphs():
    torch._dynamo.reset()


IDS = torch.tensor([[0, 5, 4, 12], [11, 5, -1, 7]])


def layer(rank=1, emb_size=4, **options):
    return ParallelVocabEmbedding(12, emb_size, rank, 3, **options)


@pytest.mark.parametrize(("rank", "padding_idx"), [(0, None), (1, 5)])
def test_compiled_forward_and_backward_are_one_graph(rank, padding_idx):
    assert_compiled_is_the_same(layer(rank, padding_idx=padding_idx), IDS)


def test_compiled_graphs_are_the_same_on_every_rank():
    for padding_idx in (None, 5):
        counter = CompileCounterWithBackend("aot_eager")
        for rank in range(12):
            emb = ParallelVocabEmbedding(12, 4, rank, 12, padding_idx=padding_idx)
            out = torch.compile(emb, fullgraph=True, backend=counter)(IDS)
            assert torch.equal(out, emb(IDS))
            out.sum().backward()
        assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_rows_are_bits_and_16_bit_gradients_do_not_saturate(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(2, 32768)
    emb = ParallelVocabEmbedding(4, 32768, 0, 2, dtype=dtype)
    with torch.no_grad():
        emb.weight.copy_(every.view(dtype))
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode):
            found = torch.compile(emb, fullgraph=True)(torch.tensor([0, 1, 2, -1])).detach().view(torch.int16)
        assert torch.equal(found[:2], every)
        assert not found[2:].any()
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=dtype)
    torch.compile(emb, fullgraph=True)(torch.full((5000,), 6)).sum().backward()
    assert torch.equal(emb.weight.grad[2], torch.full((4,), 5000.0).to(dtype))


def test_compiled_errors_are_the_eager_ones():
    emb = layer(invalid_ids="error")
    compiled = torch.compile(emb, fullgraph=True)
    assert torch.equal(compiled(IDS.clamp(0, 11)), emb(IDS.clamp(0, 11)))
    with pytest.raises(IndexError, match=r"ids\[0, 3\] = 12 is outside the vocabulary \[0, 12\)"):
        compiled(IDS)


def test_compiled_sparse_gradients_are_refused():
    emb = layer(sparse=True)
    compiled = torch.compile(emb, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS), emb(IDS))
    with pytest.raises(Exception, match="cannot be compiled: use the dense gradient"):
        compiled(IDS)


@pytest.mark.parametrize("sparse", [False, True])
def test_mapped_over_ids_tables_and_both(sparse):
    emb = layer(sparse=sparse, padding_idx=5)
    table, lookup = emb.weight.detach(), function_of(emb)
    tables = torch.stack([table, 2 * table])
    assert torch.equal(vmap(lookup, (None, 0))(table, IDS), emb(IDS))
    assert torch.equal(vmap(lookup, (None, 1), 1)(table, IDS), emb(IDS))
    assert torch.equal(vmap(lookup, (0, None))(tables, IDS), torch.stack([emb(IDS), 2 * emb(IDS)]))
    assert torch.equal(vmap(lookup, (0, 0))(tables, IDS), torch.stack([emb(IDS[0]), 2 * emb(IDS[1])]))


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)])
def test_mapped_over_a_large_batch(in_dims):
    """From 32 MiB on rows are copied by an operator."""
    emb, ids = layer(emb_size=1024), (torch.arange(18000) * 5 % 14).view(2, -1)
    tables, lookup = torch.stack([emb.weight.detach(), 2 * emb.weight.detach()]), function_of(emb)
    arguments = [each[0] if dim is None else each for each, dim in zip((tables, ids), in_dims, strict=True)]
    for i, found in enumerate(vmap(lookup, in_dims)(*arguments)):
        own = (each if dim is None else each[i] for each, dim in zip(arguments, in_dims, strict=True))
        assert torch.equal(found, lookup(*own))


def test_per_sample_gradients_and_jacobians():
    emb = layer(padding_idx=5)
    table, lookup = emb.weight.detach(), function_of(emb)

    def loss(weight, ids):
        return lookup(weight, ids).pow(3).sum()

    expected = torch.stack([grad(loss)(table, ids) for ids in IDS])
    assert torch.equal(vmap(grad(loss), (None, 0))(table, IDS), expected)
    assert torch.equal(vmap(grad(loss), (0, 0))(torch.stack([table, table]), IDS), expected)
    found = torch.func.jacrev(function_of(layer()))(table, IDS)
    assert torch.equal(found, torch.func.jacrev(looked_up)(table, IDS, 4))


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_transforms(backend):
    """The loss is linear in the rows: what a foreign id leaves behind would show. Sums are of integers, hence exact."""
    partition, weights = VocabPartition(12, 3), torch.randint(-9, 10, (2, 4, 4)).float()
    factors = torch.randint(-9, 10, (*IDS.shape, 4)).float()

    def check(function, padding_idx):
        def loss(weight, ids):
            return (partial_lookup(weight, ids, partition, 1, padding_idx=padding_idx) * factors).sum()

        def transformed(weights, ids):
            return function(loss, weights, ids)

        torch._dynamo.reset()
        expected = transformed(weights, IDS)
        assert torch.equal(torch.compile(transformed, fullgraph=True, backend=backend)(weights, IDS), expected)

    def of_vmap(loss, weights, ids):
        return grad(lambda weights: vmap(loss, (0, None))(weights, ids).sum())(weights)

    transforms = [
        lambda loss, weights, ids: grad(loss)(weights[0], ids),
        lambda loss, weights, ids: vmap(grad(loss), (0, None))(weights, ids),
        of_vmap,
        lambda loss, weights, ids: torch.func.jacrev(loss)(weights[0], ids),
        lambda loss, weights, ids: vmap(loss, (0, None))(weights, ids),
    ]
    for function, padding_idx in itertools.product(transforms, (None, 5) if backend == "eager" else (5,)):
        check(function, padding_idx)


def test_forward_mode_is_refused():
    partition, weight = VocabPartition(12, 3), torch.randn(4, 4)
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode), pytest.raises(NotImplementedError):
            torch.func.jvp(lambda weight: partial_lookup(weight, IDS, partition, 1), (weight,), (weight,))


def test_exported_for_any_number_of_ids():
    emb = layer()
    exported = torch.export.export(emb, (IDS[0],), dynamic_shapes=({0: torch.export.Dim("tokens")},)).module()
    for tokens in (2, 7, 3000):
        ids = torch.arange(tokens)
        assert torch.equal(exported(ids), emb(ids))


def test_fake_tensors_have_the_right_shapes():
    with FakeTensorMode():
        emb = layer(dtype=torch.bfloat16)
        out = emb(torch.zeros(2, 5, dtype=torch.int32))
        out.sum().backward()
        assert (out.shape, out.dtype, emb.weight.grad.shape) == ((2, 5, 4), torch.bfloat16, (4, 4))
