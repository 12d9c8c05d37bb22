"""The rows of zeros around a table: used where they are, never where they are not, and seen by no one."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from torch_impl import ParallelVocabEmbedding, partial_lookup
from torch_impl.local.frame import empty_table, framed

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IDS = torch.tensor([[0, 8, 9, 15, 16], [-1, 24, 2**40, -(2**63), 12]])


def layer(rank=1, **options):
    return ParallelVocabEmbedding(24, 5, rank, 3, **options)


@pytest.fixture(params=[1, 100])
def ids(request):
    """Few of them, and more than what is looked up by the shortest way."""
    return IDS.repeat(request.param, 1)


def expected(table, ids, start=8):
    owned = (ids >= start) & (ids < start + len(table))
    rows = torch.where(owned, ids - start, 0)
    return torch.where(owned.unsqueeze(-1), table[rows], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("emb_size", [1, 5, 64])
def test_a_table_is_aligned_and_lies_between_zeros(dtype, emb_size):
    table = empty_table(7, emb_size, dtype, "cpu").fill_(1)
    assert (table.shape, table.dtype, table.is_contiguous()) == ((7, emb_size), dtype, True)
    assert table.data_ptr() % 64 == 0
    found = framed(table)
    assert found.shape == (9, emb_size)
    assert found[:, 0].tolist() == [0, *[1] * 7, 0]
    assert found[1].data_ptr() == table.data_ptr()


def test_the_parameter_is_the_rows_and_no_others():
    emb = layer()
    assert emb.weight.shape == (8, 5)
    assert emb.weight.is_leaf
    assert list(emb.state_dict()) == ["weight"]
    assert framed(emb.weight) is not None


def moved(how, emb):
    if how == "data":
        emb.weight.data = emb.weight.data.clone()
    elif how == "another parameter":
        emb.weight = nn.Parameter(emb.weight.detach().clone())
    elif how == "deepcopy":
        emb = copy.deepcopy(emb)
    elif how == "pickle":
        emb = pickle.loads(pickle.dumps(emb))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(emb, file)
        emb = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif how == "to and back":
        emb = emb.double().float()
    elif how == "shared memory":
        emb = emb.share_memory()
    elif how == "a larger buffer":  # as Megatron keeps its parameters: what lies next to them is somebody else's
        buffer = torch.full((100,), float("nan"))
        buffer[20:60] = emb.weight.detach().reshape(-1)
        emb.weight.data = buffer[20:60].view(8, 5)
    elif how == "another storage":
        emb.weight.set_(emb.weight.detach().clone())
    return emb


WAYS = ["data", "another parameter", "deepcopy", "pickle", "torch.save", "to and back", "shared memory"]


@pytest.mark.parametrize("how", [*WAYS, "a larger buffer", "another storage"])
@pytest.mark.parametrize("before", [False, True])
def test_a_table_that_was_moved_has_none(how, before, ids):
    emb = layer()
    table = emb.weight.detach().clone()
    with torch.no_grad():
        if before:
            emb(ids)
        emb = moved(how, emb)
        assert framed(emb.weight) is None
        assert torch.equal(emb(ids), expected(table, ids))
    assert torch.equal(emb(ids), expected(table, ids))


def test_a_part_of_a_table_has_none():
    weight = layer().weight
    for part in (weight[:, :2], weight[:4], weight[1:], weight.view(4, 10), weight.T, weight.view(torch.int32)):
        assert framed(part) is None
    square = empty_table(4, 4, torch.float32, "cpu")
    assert framed(square) is not None
    assert framed(square.T) is None
    assert framed(empty_table(4, 4, torch.float16, "cpu").view(torch.bfloat16)) is None


def test_what_is_looked_up_follows_the_table(ids):
    emb = layer()
    with torch.no_grad():
        emb(ids)
        for change in (
            lambda: emb.weight.fill_(float("nan")),
            lambda: emb.load_state_dict({"weight": torch.randn(8, 5)}),
            lambda: emb.load_state_dict({"weight": torch.randn(8, 5)}, assign=True),
            lambda: emb.reset_parameters(),
            lambda: setattr(emb.weight, "data", torch.randn(8, 5)),
        ):
            change()
            torch.testing.assert_close(emb(ids), expected(emb.weight, ids), rtol=0, atol=0, equal_nan=True)


def test_padding_may_hold_anything(ids):
    """As after a model's own initialisation, which fills whole parameters."""
    ranks = [ParallelVocabEmbedding(10, 5, rank, 4, padded_vocab_size="even") for rank in range(4)]
    table = torch.randn(10, 5)
    with torch.no_grad():
        for rank, emb in enumerate(ranks):
            emb.weight.fill_(float("inf"))
            rows = table[3 * rank : 3 * rank + 3]
            emb.weight[: len(rows)] = rows
            assert torch.equal(emb(ids), expected(rows, ids, 3 * rank))


@pytest.mark.parametrize("how", ["to", "another parameter", "data"])
def test_no_memory_outlives_the_table(how):
    emb = layer()
    with torch.no_grad():
        emb(IDS)
    longer = weakref.ref(framed(emb.weight).untyped_storage())
    emb.double() if how == "to" else moved(how, emb)
    gc.collect()
    assert longer() is None


def test_the_storage_is_the_table_and_no_more():
    emb = layer()
    storage = emb.weight.untyped_storage()
    assert (storage.nbytes(), emb.weight.storage_offset(), storage.data_ptr()) == (8 * 5 * 4, 0, emb.weight.data_ptr())
    assert len(pickle.dumps(emb.weight)) == len(pickle.dumps(nn.Parameter(emb.weight.detach().clone())))
    with pytest.raises(RuntimeError, match="not resizable"):  # the rows of zeros would be left behind
        storage.resize_(0)


def test_a_tied_table_is_saved_and_loaded(tmp_path):
    def model():
        emb, head = ParallelVocabEmbedding(12, 4), nn.Linear(4, 12, bias=False)
        head.weight = emb.weight
        return nn.ModuleDict({"emb": emb, "head": head})

    saved, loaded = model(), model()
    save_model(saved, tmp_path / "model.safetensors")
    loaded["emb"].weight.data.zero_()
    load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded["emb"](torch.arange(12)), saved["emb"].weight)


def test_a_device_by_default_is_nobody_elses():
    ids = torch.arange(24).repeat(400)
    with torch.device("meta"):
        emb = ParallelVocabEmbedding(24, 1024, 1, 3)
        found = emb(ids)  # 37 MiB
        found.sum().backward()
    assert framed(emb.weight) is not None
    assert torch.equal(found[:24], expected(emb.weight, ids[:24]))
    assert emb.weight.grad[:, 0].tolist() == [400] * 8


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("write_down", [lambda f, example: make_fx(f)(*example), torch.jit.trace])
def test_a_graph_that_is_written_down_reads_the_weight_it_is_given(write_down, ids):
    emb, other = layer(), torch.randn(8, 5)
    partition = emb.partition
    written = write_down(lambda weight, ids: partial_lookup(weight, ids, partition, 1), (emb.weight.detach(), ids))
    assert torch.equal(written(other, ids.flip(0)), expected(other, ids.flip(0)))


def test_a_rank_is_one_of_those_there_are():
    emb = layer()
    for rank, error in ((-1, ValueError), (3, ValueError), (True, TypeError)):
        with pytest.raises(error, match="rank must be"):
            partial_lookup(emb.weight, IDS, emb.partition, rank)


def test_rows_lie_as_the_ids_do_not():
    """As torch's own: what is looked up can be viewed as rows."""
    emb = layer()
    for repeats in (1, 1000):
        ids = torch.arange(6).repeat(repeats).reshape(2, -1).T
        with torch.no_grad():
            assert emb(ids).is_contiguous()
        assert emb(ids).is_contiguous()
        assert torch.equal(emb(ids), expected(emb.weight, ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_a_bare_table(dtype, ids):
    for padding_idx in (None, 9):
        emb = layer(dtype=dtype, padding_idx=padding_idx)
        bare = moved("data", copy.deepcopy(emb))
        upstream = torch.randn(*ids.shape, 5).to(dtype)
        for each in (emb, bare):
            each(ids).backward(upstream)
        assert torch.equal(emb.weight.grad, bare.weight.grad)
        assert emb.weight.grad.shape == (8, 5)
