"""The lookup, against torch's own on the whole table and against the NumPy oracle."""

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared import VocabPartition
from shared.oracle import partial_lookup as oracle_lookup
from torch_impl import ParallelVocabEmbedding, partial_lookup

pytestmark = pytest.mark.usefixtures("where_the_table_lies")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64
]  # fmt: skip


def ranks(vocab_size, emb_size, world_size, **options):
    return [ParallelVocabEmbedding(vocab_size, emb_size, r, world_size, **options) for r in range(world_size)]


def table_of(modules):
    return torch.cat([emb.weight.detach() for emb in modules])


def bits(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def as_numpy(tensor):
    tensor = tensor.detach()
    return bits(tensor).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_partials_are_the_oracles_and_sum_to_the_unsharded_lookup(dtype, world_size):
    modules = ranks(48, 6, world_size, dtype=dtype)
    table = table_of(modules)
    ids = torch.cat([torch.arange(-2, 50), torch.randint(0, 48, (60,))]).view(4, -1)
    valid = (ids >= 0) & (ids < 48)
    partials = [emb(ids) for emb in modules]
    for rank, (emb, partial) in enumerate(zip(modules, partials, strict=True)):
        expected = oracle_lookup(as_numpy(emb.weight), ids.numpy(), emb.partition, rank)
        assert partial.dtype == dtype
        np.testing.assert_array_equal(bits(partial).numpy(), expected.view(bits(partial).numpy().dtype))
    assert torch.equal(sum(partials), F.embedding(ids.clamp(0, 47), table) * valid.unsqueeze(-1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_however_many_ids_a_rank_owns(share):
    modules = ranks(48, 6, 3)
    ids = torch.where(torch.rand(500) < share, torch.randint(16, 32, (500,)), torch.randint(32, 48, (500,)))
    for rank, emb in enumerate(modules):
        expected = oracle_lookup(as_numpy(emb.weight), ids.numpy(), emb.partition, rank)
        np.testing.assert_array_equal(as_numpy(emb(ids)), expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype_and_none_narrows(dtype):
    modules = ranks(600, 4, 3)
    info = torch.iinfo(dtype)
    values = [0, 5, 100, 127, *(v for v in (199, 200, 399, 400, 599, 600) if v <= info.max), info.min, info.max]
    if info.max >= 2**63:
        values += [2**63, 2**63 + 5, 2**64 - 1]
    if info.bits == 64:
        values += [2**31 + 5, 2**32, 2**32 + 5]
    ids = torch.from_numpy(np.array(values, str(dtype).removeprefix("torch.")))
    before = ids.clone()
    total = sum(emb(ids) for emb in modules)
    for row, value in zip(total, values, strict=True):
        assert torch.equal(row, table_of(modules)[value] if 0 <= value < 600 else torch.zeros(4))
    assert torch.equal(ids, before)
    outside = [value for value in values if not 0 <= value < 600]
    if outside:
        strict = ParallelVocabEmbedding(600, 4, 1, 3, invalid_ids="error")
        with pytest.raises(IndexError, match=rf"\] = {outside[0]} is outside the vocabulary"):
            strict(ids)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4, 5)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_any_shape(shape, world_size):
    for emb in ranks(24, 5, world_size):
        out = emb(torch.randint(0, 24, shape))
        assert out.shape == (*shape, 5)
        out.sum().backward()
        assert emb.weight.grad.shape == emb.weight.shape


def test_ids_of_any_memory_layout():
    ids = torch.randint(0, 24, (6, 8))
    for emb in ranks(24, 5, 3):
        for view in (ids.t(), ids[::2, 1::3], ids[0].expand(4, 8)):
            assert torch.equal(emb(view), emb(view.contiguous()))


def test_holes_are_plus_zero_and_rows_are_bits():
    modules = ranks(6, 4, 2)
    special = torch.tensor([[-0.0, 0.0, 1e-45, -1e-45], [float("nan")] * 4, [float("inf"), -float("inf"), 3e38, -0.0]])
    with torch.no_grad():
        modules[0].weight.copy_(special)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, -1, 6])
    out = modules[0](ids)
    assert torch.equal(bits(out[:3]), bits(special))
    assert not bits(out[3:]).any()
    assert not bits(modules[1](ids))[[0, 1, 2, 6, 7]].any()
    mostly = torch.tensor([0, 1, 2, 2, 1, 0, 5])
    assert torch.equal(bits(modules[0](mostly)[:3]), bits(special))
    assert not bits(modules[0](mostly)[-1]).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [24, -1]], r"ids\[1, 0\] = 24 is outside the vocabulary \[0, 24\)"),
        ([3, -5, 30], r"ids\[1\] = -5 is outside"),
        (2**40, r"ids = 1099511627776 is outside"),
    ],
)
def test_invalid_ids_error_names_the_first_on_every_rank(world_size, ids, message):
    for emb in ranks(24, 5, world_size, invalid_ids="error"):
        with pytest.raises(IndexError, match=message):
            emb(torch.tensor(ids))
        ids_that_are_fine = torch.tensor([[0, 23]])
        assert emb(ids_that_are_fine).shape == (1, 2, 5)


def test_invalid_ids_error_names_unsigned_ids_as_they_are():
    emb = ParallelVocabEmbedding(24, 5, invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[0\] = 18446744073709551615 is outside"):
        emb(torch.from_numpy(np.array([2**64 - 1], np.uint64)))


@pytest.mark.parametrize(
    ("ids", "given"),
    [
        (torch.tensor([1.0]), "dtype torch.float32"),
        (torch.tensor([True]), "dtype torch.bool"),
        (torch.tensor([1j]), "dtype torch.complex64"),
        ([1, 2], "list"),
        (3, "int"),
        (np.array([1]), "ndarray"),
    ],
)
@pytest.mark.parametrize("invalid_ids", ["zero", "error"])
def test_ids_that_are_no_tensor_of_integers_are_refused(ids, given, invalid_ids):
    with pytest.raises(TypeError, match=f"ids must be a .* of an integer dtype, got {given}"):
        ParallelVocabEmbedding(24, 5, invalid_ids=invalid_ids)(ids)


def test_the_pure_function_refuses_a_table_that_is_not_the_ranks():
    with pytest.raises(ValueError, match=r"weight must hold the rank's own rows, \[8, emb_size\], got \(24, 5\)"):
        partial_lookup(torch.ones(24, 5), torch.tensor([0]), VocabPartition(24, 3), 0)
    with pytest.raises(ValueError, match="invalid_ids must be"):
        partial_lookup(torch.ones(8, 5), torch.tensor([0]), VocabPartition(24, 3), 0, invalid_ids="wrap")
    with pytest.raises(ValueError, match="rank must be in"):
        partial_lookup(torch.ones(8, 5), torch.tensor([0]), VocabPartition(24, 3), 3)
    with pytest.raises(ValueError, match="padding_idx must be"):
        partial_lookup(torch.ones(8, 5), torch.tensor([0]), VocabPartition(24, 3), 2, padding_idx=24)


def test_autocast_changes_nothing():
    emb = ParallelVocabEmbedding(24, 5, 1, 3)
    ids = torch.arange(24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = emb(ids)
    assert out.dtype == torch.float32
    assert torch.equal(out, emb(ids))
    out.sum().backward()
    assert emb.weight.grad.dtype == torch.float32


def test_inference_mode_and_frozen_tables():
    emb = ParallelVocabEmbedding(24, 5, 1, 3)
    ids = torch.arange(24)
    with torch.inference_mode():
        assert torch.equal(emb(ids)[8:16], emb.weight)
    emb.weight.requires_grad_(False)
    assert not emb(ids).requires_grad
