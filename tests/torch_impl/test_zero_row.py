"""The row of zeros behind a table: used where it is, never where it is not, and seen by no one."""

import copy
import gc
import io
import weakref

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch_layers import DTYPES, function_of, looked_up, on_ranks

from torch_impl import ParallelVocabEmbedding, partial_lookup

IDS = torch.tensor([[0, 8, 9, 15, 16], [-1, 24, 2**40, -(2**63), 12]])


def layer(**options):
    return ParallelVocabEmbedding(24, 5, 1, 3, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_table_has_one_and_the_parameter_is_the_rows_alone(dtype):
    emb = layer(dtype=dtype)
    longer, storage = emb.zero_padded(), emb.weight.untyped_storage()
    assert (longer.shape, longer.data_ptr()) == ((9, 5), emb.weight.data_ptr())
    assert torch.equal(longer[:8], emb.weight)
    assert not longer[8].any()
    assert emb.weight.data_ptr() % 64 == 0
    assert (emb.weight.shape, emb.weight.is_leaf, emb.weight.storage_offset()) == ((8, 5), True, 0)
    assert (storage.nbytes(), storage.data_ptr()) == (8 * 5 * dtype.itemsize, emb.weight.data_ptr())


def torch_save(emb):
    file = io.BytesIO()
    torch.save(emb, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_a_larger_buffer(emb):
    """As Megatron keeps its parameters: what lies next to them is somebody else's."""
    buffer = torch.full((100,), float("nan"))
    buffer[20:60] = emb.weight.detach().reshape(-1)
    emb.weight.data = buffer[20:60].view(8, 5)


def of_another_layer(emb):
    other = layer(init_base_seed=0)
    other.weight.data.copy_(emb.weight)
    emb.weight = other.weight


MOVES = {  # what moves a table's rows into other memory
    "deepcopy": copy.deepcopy,
    "torch.save": torch_save,
    "to and back": lambda emb: emb.double().float(),
    "shared memory": lambda emb: emb.share_memory(),
    "assigned": lambda emb: emb.load_state_dict({"weight": emb.weight.detach().clone()}, assign=True) and emb,
    "another layer's": of_another_layer,
    "a larger buffer": in_a_larger_buffer,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_table_that_was_moved_has_none_and_its_memory_is_released(move):
    emb = layer()
    table, longer = emb.weight.detach().clone(), weakref.ref(emb.zero_padded())
    with torch.no_grad():
        emb(IDS)
        emb = MOVES[move](emb) or emb
        if move == "a larger buffer":  # unseen until the next lookup
            emb(IDS)
        gc.collect()
        assert longer() is None
        assert emb._longer is None  # a copy of it neither
        assert torch.equal(emb(IDS), looked_up(table, IDS, 8))
    output = emb(IDS)
    assert torch.equal(output, looked_up(table, IDS, 8))
    output.sum().backward()
    assert emb.weight.grad[:, 0].tolist() == [1, 1, 0, 0, 1, 0, 0, 1]


def test_no_memory_outlives_a_table_without_numbers():
    for change in (lambda emb: emb.to_empty(device="cpu"), lambda emb: emb.to("meta")):
        emb = layer()
        longer = weakref.ref(emb.zero_padded())
        change(emb)
        gc.collect()
        assert longer() is None


def test_what_is_looked_up_follows_the_table():
    emb, other = layer(), torch.randn(8, 5)
    with torch.no_grad():
        assert torch.equal(function_of(emb)(other, IDS), looked_up(other, IDS, 8))
        for change in (
            lambda: None,
            lambda: emb.weight.fill_(float("nan")),
            lambda: emb.load_state_dict({"weight": torch.randn(8, 5)}),
            lambda: emb.reset_parameters(),
        ):
            change()
            assert emb.zero_padded() is not None
            torch.testing.assert_close(emb(IDS), looked_up(emb.weight, IDS, 8), rtol=0, atol=0, equal_nan=True)


def test_other_shapes_of_the_same_memory_have_none():
    for view in (lambda t: t.T, lambda t: t.view(torch.bfloat16)):
        emb = ParallelVocabEmbedding(4, 4, dtype=torch.float16)
        emb.weight.data = view(emb.weight.data)
        assert emb.zero_padded() is None
        with torch.no_grad():
            torch.testing.assert_close(emb(torch.tensor([1])), emb.weight[1:2], rtol=0, atol=0, equal_nan=True)


def test_padding_may_hold_anything():
    """As after a model's own initialisation, which fills whole parameters."""
    table = torch.randn(10, 5)
    for rank in range(4):
        emb = ParallelVocabEmbedding(10, 5, rank, 4, padded_vocab_size="even")
        with torch.no_grad():
            emb.weight.fill_(float("inf"))
            rows = table[3 * rank : 3 * rank + 3]
            emb.weight[: len(rows)] = rows
            assert torch.equal(emb(IDS), looked_up(rows, IDS, 3 * rank))


def test_tied_tables_are_saved_and_loaded(tmp_path):
    def model():
        emb, head = ParallelVocabEmbedding(12, 4), nn.Linear(4, 12, bias=False)
        head.weight = emb.weight
        other = ParallelVocabEmbedding(12, 4)
        other.weight = emb.weight
        return nn.ModuleDict({"emb": emb, "head": head, "other": other})

    saved, loaded = model(), model()
    save_model(saved, tmp_path / "model.safetensors")
    loaded["emb"].weight.data.zero_()
    load_model(loaded, tmp_path / "model.safetensors")
    for name in ("emb", "other"):
        assert torch.equal(loaded[name](torch.arange(12)), saved["emb"].weight)


def test_make_fx_graph_reads_the_weight_it_is_given():
    emb, other, ids = layer(), torch.randn(8, 5), IDS.flip(0)
    for lookup in (lambda weight, ids: partial_lookup(weight, ids, emb.partition, 1), function_of(emb)):
        graph = make_fx(lookup)(emb.weight.detach(), IDS)
        assert torch.equal(graph(other, ids), looked_up(other, ids, 8))


@pytest.mark.parametrize("shape", [(7, 5), (9, 5), (8, 4)])
def test_a_table_of_another_size_is_refused(shape):
    emb = layer()
    emb.weight = nn.Parameter(torch.ones(shape))
    for grad_mode in (False, True):
        with torch.set_grad_enabled(grad_mode), pytest.raises(ValueError, match=r"rank's own rows, \[8, 5\], got \["):
            emb(IDS)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_jit_is_refused_and_bakes_nothing_in():
    with pytest.raises(RuntimeError):  # it has no operation that views memory as another dtype
        torch.jit.trace(layer(), (IDS,))


@on_ranks(2)
def test_fully_shard_leaves_no_memory_behind():
    from torch.distributed.fsdp import fully_shard

    emb = ParallelVocabEmbedding(24, 5)
    longer, table = weakref.ref(emb.zero_padded()), emb.weight.detach().clone()
    fully_shard(emb)
    gc.collect()
    assert longer() is None
    assert torch.equal(emb(IDS[:1]), table[IDS[:1]])
