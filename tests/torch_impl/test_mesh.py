"""A layer whose weight is a DTensor over a mesh, against the plain layer and the unsharded model."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

from shared import VocabPartition
from torch_impl import (
    ParallelLMHead,
    ParallelVocabEmbedding,
    clip_grad_norm_,
    local_state_dict,
    partial_lookup,
    reduced_lookup,
    sharded_state_dict,
)

EMB, STEPS = 4, 30
IDS = torch.tensor([[0, 4, 2, 6, 4, 1], [6, 7, -1, 3, 5, 0]])


def mesh_of(*sizes):
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def table_of(vocab_size, dtype=torch.float32):
    return ParallelVocabEmbedding(vocab_size, EMB, init="global", dtype=dtype).weight.detach()


def layer_of(mesh, vocab_size, **options):
    return ParallelVocabEmbedding(vocab_size, EMB, device_mesh=mesh, **{"init": "global", **options})


def check_weight(vocab_size, padded):
    mesh = mesh_of(dist.get_world_size())
    emb = layer_of(mesh, vocab_size, padded_vocab_size=padded)
    rows = vocab_size if padded is None else emb.padded_vocab_size
    assert isinstance(emb.weight, nn.Parameter)
    assert isinstance(emb.weight, DTensor)
    assert (emb.weight.shape, emb.weight.placements, emb.device_mesh) == ((rows, EMB), (Shard(0),), mesh)
    assert (emb.rank, emb.world_size, emb.process_group) == (dist.get_rank(), dist.get_world_size(), mesh.get_group())
    expected = torch.cat([table_of(vocab_size), torch.zeros(rows - vocab_size, EMB)])
    assert torch.equal(emb.weight.full_tensor(), expected)
    plain = ParallelVocabEmbedding(
        vocab_size,
        EMB,
        process_group=dist.group.WORLD,
        padded_vocab_size="even" if padded is None else padded,
        padding_idx=1,
    )
    emb = layer_of(mesh, vocab_size, padded_vocab_size=padded, init="per_rank", padding_idx=1)
    assert torch.equal(emb.weight.to_local(), plain.weight[: len(emb.weight.to_local())])


# Over 4 ranks: 8 divides; 7 leaves 1 row to the last; 5 leaves 2, 2, 1, 0; 2 leaves two ranks without any.
@pytest.mark.parametrize(("vocab_size", "padded"), [(8, None), (7, None), (5, None), (2, None), (7, "even"), (5, 16)])
def test_the_weight_is_the_whole_table(world, vocab_size, padded):
    world(4)(check_weight, vocab_size, padded)


def reduced(partial_or_chunk, reduction):
    """The embedding from what a rank has of it."""
    mesh = mesh_of(dist.get_world_size())
    if reduction == "all_reduce":
        return partial_or_chunk
    if reduction == "reduce_scatter":
        return DTensor.from_local(partial_or_chunk, mesh, [Shard(1)], run_check=False).full_tensor()
    total = partial_or_chunk.detach().clone()
    dist.all_reduce(total)
    return total


def expected_embedding(table, ids):
    valid = ((ids >= 0) & (ids < len(table))).unsqueeze(-1)
    return torch.where(valid, table[ids.clamp(0, len(table) - 1)], 0)


def check_lookup(vocab_size, reduction, exchange, dtype, options):
    w = dist.get_world_size()
    mesh, ids = mesh_of(w), IDS[:, : 6 - 6 % w]
    table, part = table_of(vocab_size, dtype), VocabPartition(vocab_size, w, "even")
    emb = layer_of(mesh, vocab_size, reduction=reduction, exchange=exchange, dtype=dtype, **options)
    whole = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=options.get("padding_idx"))
    upstream = torch.randn(*ids.shape, EMB, generator=torch.Generator().manual_seed(3)).round().to(dtype)
    expected = expected_embedding(whole.weight, ids)
    (expected * upstream).sum().backward()
    expected_grad = whole.weight.grad.clone()
    if "padding_idx" in options:
        expected_grad[options["padding_idx"]] = 0
        with torch.no_grad():
            table[options["padding_idx"]] = 0
        expected = expected_embedding(table, ids)
    mine = upstream.chunk(w, 1)[dist.get_rank()] if reduction == "reduce_scatter" else upstream
    rows = emb.weight.to_local().detach().clone().requires_grad_()
    bare = {name: value for name, value in options.items() if name in ("padding_idx", "invalid_ids")}
    if reduction == "none":
        found = [emb(ids), partial_lookup(rows, ids, part, emb.rank, **bare)]
    else:
        how = {"reduction": reduction, "exchange": exchange, **bare}
        found = [emb(ids), reduced_lookup(rows, ids, part, dist.group.WORLD, **how)]
    for output in found:
        assert type(output) is torch.Tensor
        assert torch.equal(reduced(output, reduction), expected)
        (output * mine).sum().backward()
    grad = emb.weight.grad
    assert (type(grad), grad.shape, grad.placements) == (DTensor, emb.weight.shape, (Shard(0),))
    assert torch.equal(grad.full_tensor()[:vocab_size], expected_grad)
    assert torch.equal(rows.grad, grad.to_local())


@pytest.mark.parametrize("vocab_size", [8, 7, 5])
@pytest.mark.parametrize("reduction", ["none", "all_reduce", "reduce_scatter"])
def test_lookup_and_gradient(world, vocab_size, reduction):
    for exchange in ["dense", "routed"] if reduction != "none" else ["auto"]:
        for dtype in (torch.float32, torch.bfloat16):
            world(3)(check_lookup, vocab_size, reduction, exchange, dtype, {"padding_idx": 4})
        world(4)(check_lookup, vocab_size, reduction, exchange, torch.float32, {"check": True})
    world(4)(check_lookup, 2, reduction, "auto", torch.float32, {})  # two ranks without a row


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
        return [
            partial_lookup(rows, IDS, part, rank),
            *(of(rows) for of in (first, second)),
            *torch.func.vmap(first)(batch),
        ]

    output, *found = derivatives(padded[: stop - start])
    expected_output, *expected = derivatives(padded)
    assert torch.equal(output, expected_output)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other[: stop - start])


def test_rows_of_another_rank_or_height_are_refused():
    part = VocabPartition(5, 4, "even")
    for rank, rows, rule in (
        (0, 1, r"\[2, 4\], got"),
        (2, 0, r"\[2, 4\] or \[1, 4\] without its padding, got \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match="weight must hold the rank's own rows, " + rule):
            partial_lookup(torch.zeros(rows, EMB), IDS, part, rank)


def check_own_ids(exchange):
    """Each rank its own ids, of its own number."""
    mesh, table, rank = mesh_of(4), table_of(5), dist.get_rank()
    emb = layer_of(mesh, 5, reduction="all_to_all", exchange=exchange)
    whole = nn.Embedding.from_pretrained(table, freeze=False)
    for each in range(4):
        expected = expected_embedding(whole.weight, IDS[:, each : each + 2 + each % 2])
        expected.sum().backward()
        if each == rank:
            found = emb(IDS[:, each : each + 2 + each % 2])
            assert torch.equal(found, expected)
    found.sum().backward()
    assert torch.equal(emb.weight.grad.full_tensor(), whole.weight.grad)


def test_all_to_all(world):
    for exchange in ("dense", "routed"):
        world(4)(check_own_ids, exchange)


def check_one_row_path():
    emb = layer_of(mesh_of(2), 7)
    before = emb._longer
    assert before is not None
    emb(IDS)
    emb.half().float()
    assert emb._longer is None
    assert layer_of(mesh_of(2), 7, device="meta")._longer is None


def test_zero_row_lasts_as_long_as_the_rows_memory(world):
    world(2)(check_one_row_path)


def check_compiled(reduction):
    emb = layer_of(mesh_of(2), 7, reduction=reduction)
    compiled = torch.compile(emb, fullgraph=True, backend="aot_eager")
    outputs = []
    for module in (emb, compiled):
        emb.zero_grad()
        output = module(IDS)
        output.square().sum().backward()
        outputs.append((output, emb.weight.grad.to_local()))
    for eager, graph in zip(*outputs, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "all_reduce", "reduce_scatter"])
def test_compiled(world, reduction):
    world(2)(check_compiled, reduction)


def refused(error, match, **arguments):
    with pytest.raises(error, match=match):
        ParallelVocabEmbedding(8, EMB, **arguments)


def check_refusals():
    mesh, flat = mesh_of(2, 2), mesh_of(4)
    refused(ValueError, r'device_mesh must have one dimension, got 2, .*: pass .* mesh\["tp"\]', device_mesh=mesh)
    refused(ValueError, "process_group must be left out", device_mesh=flat, process_group=dist.group.WORLD)
    refused(TypeError, "device_mesh must be a torch.distributed.device_mesh.DeviceMesh, got int", device_mesh=4)
    refused(ValueError, "rank must agree with device_mesh", device_mesh=flat, rank=(dist.get_rank() + 1) % 4)
    refused(ValueError, "world_size must agree with device_mesh", device_mesh=mesh["tp"], world_size=4)
    refused(ValueError, "sparse must be False with device_mesh", device_mesh=flat, sparse=True)
    refused(ValueError, "gradient_accumulation_fusion must", device_mesh=flat, gradient_accumulation_fusion=True)
    emb = layer_of(flat, 8)
    emb.weight = nn.Parameter(torch.zeros(2, EMB))
    with pytest.raises(ValueError, match=r"weight must be a DTensor Shard\(0\) .* got a plain tensor"):
        emb(IDS)
    fourth = dist.DeviceMesh("cpu", [0, 1, 2])
    if dist.get_rank() == 3:
        refused(ValueError, "device_mesh must hold this process", device_mesh=fourth)


def test_what_is_refused(world):
    world(4)(check_refusals)


class Model(nn.Module):
    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        torch.manual_seed(1)
        self.out = nn.Linear(EMB, EMB, dtype=emb.weight.dtype)

    def forward(self, ids):
        return self.out(self.emb(ids)).square().mean()


def whole_model(vocab_size, dtype=torch.float64):
    return Model(nn.Embedding.from_pretrained(table_of(vocab_size, dtype), freeze=False))


def batches(vocab_size):
    return torch.randint(0, vocab_size, (STEPS, 2, 8), generator=torch.Generator().manual_seed(0))


def all_dtensors(model, mesh):
    """The parameters beside the table as replicated DTensors, as parallelize_module's plans have them."""

    def replicated(inputs):
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    distribute_module(
        model.out, mesh, input_fn=lambda _, inputs, __: replicated(inputs), output_fn=lambda _, out, __: out.to_local()
    )


def check_clipping(kind, vocab_size):
    """In float64, where 30 steps differ by some roundings: what is clipped by another norm is far off."""
    whole = whole_model(vocab_size)
    if "fully_shard" in kind:
        mesh = mesh_of(2, 2)
        model = Model(layer_of(mesh["tp"], vocab_size, reduction="all_reduce", dtype=torch.float64))
        if kind == "fully_shard":  # torch's own wants all parameters on one mesh
            all_dtensors(model, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
    else:
        mesh = mesh_of(dist.get_world_size())
        model = Model(layer_of(mesh, vocab_size, reduction="all_reduce", dtype=torch.float64))
        if kind == "torch":
            all_dtensors(model, mesh)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1, eps=1e-3) for each in (model, whole)]
    for ids in batches(vocab_size):
        norms = []
        for each, optimizer in zip((model, whole), optimizers, strict=True):
            optimizer.zero_grad()
            each(ids).backward()
            clip = clip_grad_norm_ if "ours" in kind and each is model else None
            norm = clip(each, 0.05) if clip else nn.utils.clip_grad_norm_(each.parameters(), 0.05)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.step()
        torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
    for name, parameter in model.named_parameters():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(found, whole.get_parameter(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "ours", "fully_shard", "ours, fully_shard"])
@pytest.mark.parametrize("vocab_size", [24, 23])
def test_clipped_training_follows_the_unsharded_model(world, kind, vocab_size):
    world(4)(check_clipping, kind, vocab_size)


class Trainer(Stateful):
    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(self, ids):
        for each in ids:
            self.optimizer.zero_grad()
            self.model(each).backward()
            self.optimizer.step()
        return self

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def trainer_of(vocab_size, split):
    mesh = mesh_of(2, 2) if split else mesh_of(dist.get_world_size())
    tp = mesh["tp"] if split else mesh
    model = Model(layer_of(tp, vocab_size, reduction="all_reduce", dtype=torch.float64))
    return Trainer(fully_shard(model, mesh=mesh["dp"]) if split else model)


def check_save(folder, vocab_size, how, split=False):
    trainer = trainer_of(vocab_size, split).train(batches(vocab_size)[:3])
    state = {"app": trainer if how == "stateful" else trainer.state_dict()}
    if how == "async_save":
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)


def check_load(folder, vocab_size, how, split=False):
    trainer = trainer_of(vocab_size, split).train(batches(vocab_size)[5:6])
    if how == "stateful":
        dcp.load({"app": trainer}, checkpoint_id=folder)
    else:
        state = trainer.state_dict()
        dcp.load({"app": state}, checkpoint_id=folder)
        trainer.load_state_dict(state)
    whole = Trainer(whole_model(vocab_size)).train(batches(vocab_size)[:6])
    trainer.train(batches(vocab_size)[3:6])  # goes on as if it had never stopped
    torch.testing.assert_close(trainer.model.emb.weight.full_tensor(), whole.model.emb.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("vocab_size", "how"), [(7, "stateful"), (8, "state_dict"), (5, "async_save")])
def test_checkpoints_load_over_another_number_of_ranks(world, tmp_path, vocab_size, how):
    world(4)(check_save, str(tmp_path), vocab_size, how)
    for ranks in (4, 3, 2):
        world(ranks)(check_load, str(tmp_path), vocab_size, how)


def test_checkpoints_of_what_fully_shard_has_split_further(world, tmp_path):
    world(4)(check_save, str(tmp_path / "split"), 7, "stateful", True)
    world(4)(check_load, str(tmp_path / "split"), 7, "stateful", True)
    world(3)(check_load, str(tmp_path / "split"), 7, "stateful")
    world(3)(check_save, str(tmp_path / "whole"), 7, "stateful")
    world(4)(check_load, str(tmp_path / "whole"), 7, "stateful", True)


def check_reset(vocab_size, init):
    mesh = mesh_of(2, 2)
    expected = layer_of(mesh["tp"], vocab_size, init=init, padding_idx=2).weight.full_tensor()
    emb = layer_of(mesh["tp"], vocab_size, init=init, padding_idx=2, device="meta")
    fully_shard(emb, mesh=mesh["dp"])
    emb.to_empty(device="cpu")
    emb.reset_parameters()
    assert torch.equal(emb.weight.full_tensor(), expected)


@pytest.mark.parametrize("init", ["per_rank", "global"])
def test_meta_then_fully_shard_then_to_empty_then_reset(world, init):
    for vocab_size in (8, 7, 5):
        world(4)(check_reset, vocab_size, init)


def check_files(path, vocab_size, padded):
    mesh, table = mesh_of(2, 2), table_of(vocab_size)
    options = {"device_mesh": mesh["tp"], "padded_vocab_size": padded}
    emb = ParallelVocabEmbedding.from_embedding(table, **options)
    rows = table if padded is None else torch.cat([table, torch.zeros(emb.padded_vocab_size - vocab_size, EMB)])
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
    emb.weight.full_tensor()
    assert torch.equal(emb.weight.full_tensor()[:vocab_size], table)
    dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=f"{path}.split")


@pytest.mark.parametrize("padded", [None, "even", 16])
def test_tables_in_files_and_in_memory(world, tmp_path, padded):
    path = str(tmp_path / "table.safetensors")
    world(4)(check_files, path, 7, padded)
    assert torch.equal(ParallelVocabEmbedding.from_table(path).weight, table_of(7))
    for folder in ("dcp", "split"):
        plain = ParallelVocabEmbedding(7, EMB)
        dcp.load(plain.sharded_state_dict("emb."), checkpoint_id=f"{path}.{folder}", no_dist=True)
        assert torch.equal(plain.weight, table_of(7))


def check_head(vocab_size, tied):
    mesh, ids = mesh_of(4), IDS.clamp(0, vocab_size - 1)
    hidden = torch.randn(*ids.shape, EMB, generator=torch.Generator().manual_seed(2)).requires_grad_()
    results = []
    for place in ({"device_mesh": mesh}, {"process_group": dist.group.WORLD, "padded_vocab_size": "even"}):
        emb = ParallelVocabEmbedding(vocab_size, EMB, init="global", reduction="all_reduce", **place)
        head = ParallelLMHead(emb, tied=tied)
        loss, logits = head(emb(ids) + hidden if tied else hidden, targets=ids), head(hidden)
        hidden.grad = None
        loss.backward()
        start, stop = emb.partition.owned_range(emb.rank)
        grad = emb.own_rows(emb.weight.grad)[0][: stop - start]
        results.append((loss.detach(), logits.detach(), hidden.grad, grad))
    for with_mesh, plain in zip(*results, strict=True):
        assert torch.equal(with_mesh, plain)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_dtensor_is_that_of_a_plain_table(world, tied):
    for vocab_size in (8, 7, 5):
        world(4)(check_head, vocab_size, tied)


def check_own_state_dicts(folder):
    mesh = mesh_of(4)
    for padded in (None, 16):
        emb = layer_of(mesh, 7, padded_vocab_size=padded)
        dcp.save(sharded_state_dict(emb, get_model_state_dict(emb)), checkpoint_id=f"{folder}/{padded}")
        other = layer_of(mesh, 7, padded_vocab_size=padded, init_base_seed=1)
        dcp.load(state := sharded_state_dict(other, get_model_state_dict(other)), checkpoint_id=f"{folder}/{padded}")
        other.load_state_dict(local_state_dict(state))
        assert torch.equal(other.weight.full_tensor(), emb.weight.full_tensor())
        emb.weight.grad = torch.ones_like(emb.weight)
        emb.zero_padding_grad()
        assert emb.weight.grad.full_tensor().sum() == 7 * EMB


def test_what_plain_tables_need_does_dtensors_no_harm(world, tmp_path):
    world(4)(check_own_state_dicts, str(tmp_path))


def check_copies():
    emb = layer_of(mesh_of(2), 7, reduction="all_reduce")
    twin = copy.deepcopy(emb)
    assert torch.equal(twin(IDS), emb(IDS))
    other = layer_of(mesh_of(2), 7, init_base_seed=1)
    other.load_state_dict(emb.state_dict())
    assert list(emb.state_dict()) == ["weight"]
    assert torch.equal(other.weight.full_tensor(), emb.weight.full_tensor())


def test_copies_and_state_dicts(world):
    world(2)(check_copies)
