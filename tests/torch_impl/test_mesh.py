"""A layer whose weight is a DTensor over a mesh, against the plain layer and the unsharded model."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch_layers import MODES, assert_compiled_is_the_same, assert_refused, equal_bits, mesh_of, on_ranks, over

from shared import VocabPartition
from torch_impl import ParallelLMHead, ParallelVocabEmbedding, partial_lookup, reduced_lookup

EMB = 4
IDS = torch.tensor([[0, 4, 2, 6], [6, 7, -1, 3]])


def table_of(vocab_size):
    return ParallelVocabEmbedding(vocab_size, EMB, init="global").weight.detach()


def layer(place, vocab_size, **options):
    """Over all ranks, as a DTensor or plain and padded."""
    options = {**over(place, mesh_of(dist.get_world_size())), "init": "global", **options}
    return ParallelVocabEmbedding(vocab_size, EMB, **options)


@on_ranks(4)
def test_weight():
    """Over 4 ranks: 8 divides; 7 leaves 1 row to the last; 5 leaves 2, 2, 1, 0; 2 leaves two ranks without any."""
    mesh = mesh_of(4)
    for vocab_size, padded in ((8, None), (7, None), (5, None), (2, None), (7, "even"), (5, 16)):
        emb = layer("device_mesh", vocab_size, padded_vocab_size=padded)
        rows = vocab_size if padded is None else emb.padded_vocab_size
        assert isinstance(emb.weight, nn.Parameter)
        assert isinstance(emb.weight, DTensor)
        assert (emb.weight.shape, emb.weight.placements, emb.device_mesh) == ((rows, EMB), (Shard(0),), mesh)
        assert (emb.rank, emb.world_size, emb.process_group) == (dist.get_rank(), 4, mesh.get_group())
        expected = torch.cat([table_of(vocab_size), torch.zeros(rows - vocab_size, EMB)])
        assert torch.equal(emb.weight.full_tensor(), expected), (vocab_size, padded)
        options = {"init": "per_rank", "padding_idx": 1}
        local = layer("device_mesh", vocab_size, padded_vocab_size=padded, **options).weight.to_local()
        plain = layer("process_group", vocab_size, padded_vocab_size=padded or "even", **options)
        assert torch.equal(local, plain.weight[: len(local)]), (vocab_size, padded)
        emb.weight.grad = torch.ones_like(emb.weight)
        emb.zero_padding_grad()
        assert emb.weight.grad.full_tensor().sum() == vocab_size * EMB, (vocab_size, padded)


@on_ranks(4)
def test_lookups():
    """Rows, gradients and the pure functions: in every bit those of a plain layer."""
    modes = [("none", "auto"), *MODES, ("all_to_all", "dense"), ("all_to_all", "routed")]
    kinds = {"check": True}, {"padding_idx": 1, "dtype": torch.bfloat16}
    for (reduction, exchange), vocab_size, kind in itertools.product(modes, (8, 7, 5, 2), kinds):
        options = {"reduction": reduction, "exchange": exchange, **kind}
        emb, plain = (layer(place, vocab_size, **options) for place in ("device_mesh", "process_group"))
        rows = emb.weight.to_local().detach().clone().requires_grad_()
        ids = IDS[:, : 1 + emb.rank % 3] if reduction == "all_to_all" else IDS
        of_rows = {"partition": plain.partition, "padding_idx": kind.get("padding_idx")}
        if reduction == "none":
            bare = partial_lookup(rows, ids, rank=emb.rank, **of_rows)
        else:
            how = {"reduction": reduction, "exchange": exchange, "process_group": dist.group.WORLD}
            bare = reduced_lookup(rows, ids, **how, **of_rows)
        expected = plain(ids)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(expected.dtype)
        for output in (expected, emb(ids), bare):
            assert type(output) is torch.Tensor
            assert equal_bits(output, expected), (vocab_size, options)
            output.backward(upstream)
        grad = emb.weight.grad
        assert (type(grad), grad.shape, grad.placements) == (DTensor, emb.weight.shape, (Shard(0),))
        assert equal_bits(grad.to_local(), plain.weight.grad[: len(rows)]), (vocab_size, options)
        assert equal_bits(rows.grad, grad.to_local()), (vocab_size, options)


@on_ranks(4)
def test_head_is_that_of_a_plain_layer():
    for tied, vocab_size in itertools.product((True, False), (8, 7, 5)):
        ids = IDS.clamp(0, vocab_size - 1)
        hidden = torch.randn(*ids.shape, EMB, generator=torch.Generator().manual_seed(2)).requires_grad_()
        results = []
        for place in ("device_mesh", "process_group"):
            emb = layer(place, vocab_size, reduction="all_reduce")
            head = ParallelLMHead(emb, tied=tied)
            loss, logits = head(emb(ids) + hidden if tied else hidden, targets=ids), head(hidden)
            hidden.grad = None
            loss.backward()
            start, stop = emb.partition.owned_range(emb.rank)
            grad = emb.own_rows(emb.weight.grad)[0][: stop - start]
            results.append((loss.detach(), logits.detach(), hidden.grad, grad))
        for with_mesh, plain in zip(*results, strict=True):
            assert torch.equal(with_mesh, plain), (tied, vocab_size)


PART = VocabPartition(5, 4, "even")  # 2, 2, 1 and 0 rows


@pytest.mark.parametrize("rank", range(4))
def test_rows_without_padding_give_what_those_with_padding_give(rank):
    start, stop = PART.owned_range(rank)
    padded = torch.zeros(2, EMB)
    padded[: stop - start] = table_of(5)[start:stop]
    factors = torch.arange(float(IDS.numel())).view(*IDS.shape, 1)

    def loss(rows):
        return (partial_lookup(rows, IDS, PART, rank, padding_idx=2).pow(3) * factors).sum()

    def derivatives(rows):
        first, second = torch.func.grad(loss), torch.func.grad(lambda rows: torch.func.grad(loss)(rows).sum())
        batch = torch.stack([rows, 2 * rows])
        output = partial_lookup(rows, IDS, PART, rank)
        return [output, first(rows), second(rows), *torch.func.vmap(first)(batch)]

    output, *found = derivatives(padded[: stop - start])
    expected_output, *expected = derivatives(padded)
    assert torch.equal(output, expected_output)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other[: stop - start])
    legal = r"\[2, 4\]" + ("", "", r" or \[1, 4\] without its padding", r" or \[0, 4\] without its padding")[rank]
    with pytest.raises(ValueError, match=rf"weight must hold the rank's own rows, {legal}, got \[3, 4\]"):
        partial_lookup(torch.zeros(3, EMB), IDS, PART, rank)


@on_ranks(2)
def test_copies_state_dicts_and_the_row_of_zeros():
    """The row of zeros lasts as long as the rows' memory."""
    emb, other = (layer("device_mesh", 7, reduction="all_reduce", init_base_seed=seed) for seed in (0, 1))
    assert torch.equal(copy.deepcopy(emb)(IDS), emb(IDS))
    other.load_state_dict(emb.state_dict())
    assert list(emb.state_dict()) == ["weight"]
    assert torch.equal(other.weight.full_tensor(), emb.weight.full_tensor())
    assert emb._longer is not None
    emb.half().float()
    assert emb._longer is None
    assert layer("device_mesh", 7, device="meta")._longer is None


@on_ranks(2)
def test_tables_in_files_and_in_memory(tmp_path):
    path, table = tmp_path / "table.safetensors", table_of(7)
    for padded in (None, 16):
        options = {"device_mesh": mesh_of(2), "padded_vocab_size": padded}
        emb = ParallelVocabEmbedding.from_embedding(table, **options)
        rows = torch.cat([table, torch.zeros(len(emb.weight) - 7, EMB)])
        assert torch.equal(emb.weight.full_tensor(), rows)
        emb.save_table(path, force=True)
        assert torch.equal(ParallelVocabEmbedding.from_table(path).weight, table)
        assert torch.equal(ParallelVocabEmbedding.from_table(path, **options).weight.full_tensor(), rows)


@pytest.mark.slow
@on_ranks(2)
def test_compiled():
    for reduction in ("none", "all_reduce", "reduce_scatter"):
        torch._dynamo.reset()
        assert_compiled_is_the_same(layer("device_mesh", 7, reduction=reduction), IDS, backend="aot_eager")


@on_ranks(4)
def test_what_is_refused():
    mesh, flat, rank = mesh_of(2, 2), mesh_of(4), dist.get_rank()
    build = partial(ParallelVocabEmbedding, 8, EMB)
    replaced = layer("device_mesh", 8)
    replaced.weight = nn.Parameter(torch.zeros(2, EMB))
    one_dimension = r'device_mesh must have one dimension, got 2, .*: pass .* mesh\["tp"\]'
    fused = {"device_mesh": flat, "gradient_accumulation_fusion": True}
    assert_refused(
        (ValueError, one_dimension, lambda: build(device_mesh=mesh)),
        (ValueError, "process_group must be left", lambda: build(device_mesh=flat, process_group=dist.group.WORLD)),
        (TypeError, "device_mesh must be a torch.*.DeviceMesh, got int", lambda: build(device_mesh=4)),
        (ValueError, "rank must agree with device_mesh", lambda: build(device_mesh=flat, rank=(rank + 1) % 4)),
        (ValueError, "world_size must agree with device_mesh", lambda: build(device_mesh=mesh["tp"], world_size=4)),
        (ValueError, "sparse must be False with device_mesh", lambda: build(device_mesh=flat, sparse=True)),
        (ValueError, "gradient_accumulation_fusion must be False with device_mesh", lambda: build(**fused)),
        (ValueError, r"weight must be a DTensor Shard\(0\) .* got a plain tensor", lambda: replaced(IDS)),
    )
    of_three = dist.DeviceMesh("cpu", [0, 1, 2])
    if rank == 3:
        assert_refused((ValueError, "device_mesh must hold this process", lambda: build(device_mesh=of_three)))


@on_ranks(2)
def test_dtensors_where_plain_tensors_are_meant():
    mesh = mesh_of(2)
    plain, checked = layer("process_group", 8), layer("process_group", 8, check=True)
    partition, rows, ids = plain.partition, plain.weight, torch.arange(8)
    split_ids, table = distribute_tensor(ids, mesh, [Shard(0)]), DTensor.from_local(rows.detach(), mesh, [Shard(0)])
    of_ids = r"ids must be a plain tensor, got a DTensor \(Shard.* pass full_tensor\(\)"
    of_table = r"weight must be a plain tensor, got a DTensor .* pass to_local\(\) of it"
    reduced = partial(reduced_lookup, process_group=dist.group.WORLD, reduction="all_reduce")
    assert_refused(
        (TypeError, of_ids, lambda: plain(split_ids)),
        (TypeError, of_ids, lambda: checked(split_ids)),
        (TypeError, of_ids, lambda: torch.compile(plain, backend="aot_eager")(split_ids)),
        (TypeError, of_ids, lambda: partial_lookup(rows, split_ids, partition, plain.rank)),
        (TypeError, of_ids, lambda: reduced(rows, split_ids, partition)),
        (TypeError, of_table, lambda: partial_lookup(table, ids, partition, plain.rank)),
        (TypeError, of_table, lambda: reduced(table, ids, partition)),
    )
