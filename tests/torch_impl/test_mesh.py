"""A layer whose weight is a DTensor over a mesh, against the plain layer and the unsharded model."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch_layers import MODES, assert_refused, equal_bits, mesh_of

from shared import VocabPartition
from torch_impl import (
    ParallelLMHead,
    ParallelVocabEmbedding,
    partial_lookup,
    reduced_lookup,
)

EMB = 4
IDS = torch.tensor([[0, 4, 2, 6], [6, 7, -1, 3]])


def table_of(vocab_size):
    return ParallelVocabEmbedding(vocab_size, EMB, init="global").weight.detach()


def layer_of(mesh, vocab_size, **options):
    return ParallelVocabEmbedding(vocab_size, EMB, device_mesh=mesh, **{"init": "global", **options})


def plain_layer(vocab_size, **options):
    options = {"padded_vocab_size": "even", "init": "global", **options}
    return ParallelVocabEmbedding(vocab_size, EMB, process_group=dist.group.WORLD, **options)


def check_weight():
    """Over 4 ranks: 8 divides; 7 leaves 1 row to the last; 5 leaves 2, 2, 1, 0; 2 leaves two ranks without any."""
    mesh = mesh_of(4)
    for vocab_size, padded in ((8, None), (7, None), (5, None), (2, None), (7, "even"), (5, 16)):
        emb = layer_of(mesh, vocab_size, padded_vocab_size=padded)
        rows = vocab_size if padded is None else emb.padded_vocab_size
        assert isinstance(emb.weight, nn.Parameter)
        assert isinstance(emb.weight, DTensor)
        assert (emb.weight.shape, emb.weight.placements, emb.device_mesh) == ((rows, EMB), (Shard(0),), mesh)
        assert (emb.rank, emb.world_size, emb.process_group) == (dist.get_rank(), 4, mesh.get_group())
        expected = torch.cat([table_of(vocab_size), torch.zeros(rows - vocab_size, EMB)])
        assert torch.equal(emb.weight.full_tensor(), expected), (vocab_size, padded)
        options = {"init": "per_rank", "padding_idx": 1}
        local = layer_of(mesh, vocab_size, padded_vocab_size=padded, **options).weight.to_local()
        plain = plain_layer(vocab_size, padded_vocab_size=padded or "even", **options)
        assert torch.equal(local, plain.weight[: len(local)]), (vocab_size, padded)
        emb.weight.grad = torch.ones_like(emb.weight)
        emb.zero_padding_grad()
        assert emb.weight.grad.full_tensor().sum() == vocab_size * EMB, (vocab_size, padded)


def check_lookups():
    """Rows, gradients and the pure functions: in every bit those of a plain layer."""
    modes = [("none", "auto"), *MODES, ("all_to_all", "dense"), ("all_to_all", "routed")]
    kinds = {"check": True}, {"padding_idx": 1, "dtype": torch.bfloat16}
    for (reduction, exchange), vocab_size, kind in itertools.product(modes, (8, 7, 5, 2), kinds):
        options = {"reduction": reduction, "exchange": exchange, **kind}
        emb, plain = layer_of(mesh_of(4), vocab_size, **options), plain_layer(vocab_size, **options)
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


def check_head():
    for tied, vocab_size in itertools.product((True, False), (8, 7, 5)):
        ids = IDS.clamp(0, vocab_size - 1)
        hidden = torch.randn(*ids.shape, EMB, generator=torch.Generator().manual_seed(2)).requires_grad_()
        results = []
        for build in (partial(layer_of, mesh_of(4)), plain_layer):
            emb = build(vocab_size, reduction="all_reduce")
            head = ParallelLMHead(emb, tied=tied)
            loss, logits = head(emb(ids) + hidden if tied else hidden, targets=ids), head(hidden)
            hidden.grad = None
            loss.backward()
            start, stop = emb.partition.owned_range(emb.rank)
            grad = emb.own_rows(emb.weight.grad)[0][: stop - start]
            results.append((loss.detach(), logits.detach(), hidden.grad, grad))
        for with_mesh, plain in zip(*results, strict=True):
            assert torch.equal(with_mesh, plain), (tied, vocab_size)


@pytest.mark.parametrize("check", [check_weight, check_lookups, check_head])
def test_weight_lookups_and_head_are_those_of_a_plain_layer(world, check):
    world(4)(check)


@pytest.mark.parametrize("rank", range(4))
def test_rows_without_padding_give_what_those_with_padding_give(rank):
    part = VocabPartition(5, 4, "even")  # 2, 2, 1 and 0 rows
    start, stop = part.owned_range(rank)
    padded = torch.zeros(2, EMB)
    padded[: stop - start] = table_of(5)[start:stop]
    factors = torch.arange(float(IDS.numel())).view(*IDS.shape, 1)

    def loss(rows):
        return (partial_lookup(rows, IDS, part, rank, padding_idx=2).pow(3) * factors).sum()

    def derivatives(rows):
        first, second = torch.func.grad(loss), torch.func.grad(lambda rows: torch.func.grad(loss)(rows).sum())
        batch = torch.stack([rows, 2 * rows])
        output = partial_lookup(rows, IDS, part, rank)
        return [output, first(rows), second(rows), *torch.func.vmap(first)(batch)]

    output, *found = derivatives(padded[: stop - start])
    expected_output, *expected = derivatives(padded)
    assert torch.equal(output, expected_output)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other[: stop - start])


def check_module():
    """Copies, state dicts, and the row of zeros, which lasts as long as the rows' memory."""
    emb, other = (layer_of(mesh_of(2), 7, reduction="all_reduce", init_base_seed=seed) for seed in (0, 1))
    assert torch.equal(copy.deepcopy(emb)(IDS), emb(IDS))
    other.load_state_dict(emb.state_dict())
    assert list(emb.state_dict()) == ["weight"]
    assert torch.equal(other.weight.full_tensor(), emb.weight.full_tensor())
    assert emb._longer is not None
    emb.half().float()
    assert emb._longer is None
    assert layer_of(mesh_of(2), 7, device="meta")._longer is None


def test_copies_state_dicts_and_the_row_of_zeros(world):
    world(2)(check_module)


def check_compiled():
    for reduction in ("none", "all_reduce", "reduce_scatter"):
        torch._dynamo.reset()
        emb = layer_of(mesh_of(2), 7, reduction=reduction)
        outputs = []
        for module in (emb, torch.compile(emb, fullgraph=True, backend="aot_eager")):
            emb.zero_grad()
            output = module(IDS)
            output.square().sum().backward()
            outputs.append((output, emb.weight.grad.to_local()))
        for eager, graph in zip(*outputs, strict=True):
            assert torch.equal(eager, graph), reduction


@pytest.mark.slow
def test_compiled(world):
    world(2)(check_compiled)


def check_refusals():
    mesh, flat, rank = mesh_of(2, 2), mesh_of(4), dist.get_rank()
    build = partial(ParallelVocabEmbedding, 8, EMB)
    replaced = layer_of(flat, 8)
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


def test_what_is_refused(world):
    world(4)(check_refusals)
    part = VocabPartition(5, 4, "even")
    for rank, rows, rule in (
        (0, 1, r"\[2, 4\], got"),
        (2, 0, r"\[2, 4\] or \[1, 4\] without its padding, got \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match="weight must hold the rank's own rows, " + rule):
            partial_lookup(torch.zeros(rows, EMB), IDS, part, rank)


def check_reset():
    mesh = mesh_of(2, 2)
    for init, vocab_size in itertools.product(("per_rank", "global"), (8, 7, 5)):
        options = {"init": init, "padding_idx": 2}
        expected = layer_of(mesh["tp"], vocab_size, **options).weight.full_tensor()
        emb = layer_of(mesh["tp"], vocab_size, device="meta", **options)
        fully_shard(emb, mesh=mesh["dp"])
        emb.to_empty(device="cpu")
        emb.reset_parameters()
        assert torch.equal(emb.weight.full_tensor(), expected), (init, vocab_size)


def test_meta_then_fully_shard_then_to_empty_then_reset(world):
    world(4)(check_reset)


def check_files(path, padded):
    mesh, table = mesh_of(2, 2), table_of(7)
    options = {"device_mesh": mesh["tp"], "padded_vocab_size": padded}
    emb = ParallelVocabEmbedding.from_embedding(table, **options)
    rows = table if padded is None else torch.cat([table, torch.zeros(emb.padded_vocab_size - 7, EMB)])
    assert torch.equal(emb.weight.full_tensor(), rows)
    if mesh.get_local_rank("dp") == 0:
        emb.save_table(path)
    dist.barrier()
    assert torch.equal(ParallelVocabEmbedding.from_table(path, **options).weight.full_tensor(), rows)
    dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=f"{path}.dcp")
    fully_shard(emb, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="must not be split further"):
        emb.save_table(path, force=True)
    with torch.no_grad():
        emb.weight.to_local().fill_(-1)
    dcp.load(emb.sharded_state_dict("emb."), checkpoint_id=f"{path}.dcp")
    assert torch.equal(emb.weight.full_tensor()[:7], table)
    dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=f"{path}.split")


@pytest.mark.parametrize("padded", [None, 16])
def test_tables_in_files_and_in_memory(world, tmp_path, padded):
    path = str(tmp_path / "table.safetensors")
    world(4)(check_files, path, padded)
    assert torch.equal(ParallelVocabEmbedding.from_table(path).weight, table_of(7))
    for folder in ("dcp", "split"):
        plain = ParallelVocabEmbedding(7, EMB)
        dcp.load(plain.sharded_state_dict("emb."), checkpoint_id=f"{path}.{folder}", no_dist=True)
        assert torch.equal(plain.weight, table_of(7))
