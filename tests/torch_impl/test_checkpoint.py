"""torch.distributed.checkpoint: what some ranks saved, others load, however they pad."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
from torch_impl.table_rows import TableRows


def table(dtype=torch.bfloat16):
    return ParallelVocabEmbedding(10, 3, dtype=dtype, init="global").weight.detach()


def save(folder, padded):
    layer = ParallelVocabEmbedding(
        10, 3, process_group=dist.group.WORLD, dtype=torch.bfloat16, init="global", padded_vocab_size=padded
    )
    dcp.save({"model": layer.sharded_state_dict("emb."), "step": 7}, checkpoint_id=folder)


def load(folder, world_size, padded):
    """On the first ranks of the world."""
    group = dist.new_group(list(range(world_size)))
    if dist.get_rank() >= world_size:
        return True
    layer = ParallelVocabEmbedding(10, 3, process_group=group, dtype=torch.bfloat16, padded_vocab_size=padded)
    start, stop = layer.partition.owned_range(layer.rank)
    expected = table()
    assert not torch.equal(layer.weight[: stop - start], expected[start:stop]) or start == stop
    state = {"model": layer.sharded_state_dict("emb."), "step": 0}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    assert state["step"] == 7
    assert torch.equal(layer.weight[: stop - start], expected[start:stop])
    assert not layer.weight[stop - start :].any()
    return layer.weight.requires_grad


@pytest.mark.parametrize("saved", ["even", 24])  # 24 over 4 ranks: two of them have padding only
def test_saved_by_four_loaded_by_three_and_by_one(world, tmp_path, saved):
    world(4)(save, str(tmp_path), saved)
    for world_size, padded in ((3, "even"), (3, 30), (4, 16), (1, None)):
        assert world(4)(load, str(tmp_path), world_size, padded) == [True] * 4
    layer = ParallelVocabEmbedding(10, 3, dtype=torch.bfloat16)  # and in one process without any group
    dcp.load({"model": layer.sharded_state_dict("emb.")}, checkpoint_id=tmp_path)
    assert torch.equal(layer.weight, table())


def test_a_plain_tensor_saved_by_someone_else_loads(tmp_path):
    dcp.save({"emb.weight": table(torch.float32)}, checkpoint_id=tmp_path)
    for rank in range(4):
        layer = ParallelVocabEmbedding(10, 3, rank, 4, padded_vocab_size="even")
        dcp.load(layer.sharded_state_dict("emb."), checkpoint_id=tmp_path)
        start, stop = layer.partition.owned_range(rank)
        assert torch.equal(layer.weight[: stop - start], table(torch.float32)[start:stop])


def test_megatrons_call_is_told_where_to_go():
    with pytest.raises(TypeError, match=r"torch_impl\.adapters\.megatron\.VocabParallelEmbedding writes and reads"):
        ParallelVocabEmbedding(10, 3).sharded_state_dict(prefix="", sharded_offsets=(), metadata={})


def test_another_vocabulary_is_refused(tmp_path):
    layer = ParallelVocabEmbedding(10, 3)
    dcp.save(layer.sharded_state_dict(), checkpoint_id=tmp_path)
    before = layer.weight.detach().clone()
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load(ParallelVocabEmbedding(12, 3).sharded_state_dict(), checkpoint_id=tmp_path)
    assert torch.equal(layer.weight, before)


def test_what_stands_for_the_rows_is_for_checkpoints_alone():
    rows = ParallelVocabEmbedding(10, 3, 1, 4, padded_vocab_size="even").sharded_state_dict()["weight"]
    assert (rows.shape, rows.dtype) == ((10, 3), torch.float32)
    assert repr(rows) == "TableRows([3:6] of (10, 3), torch.float32, cpu)"
    with pytest.raises(TypeError, match="save and load alone"):
        torch.add(rows, 1)
    with pytest.raises(ValueError, match="call to_empty"):
        ParallelVocabEmbedding(10, 3, device="meta").sharded_state_dict()


class Tied(nn.Module):
    """A layer, a head that is the same parameter, and something that is not split."""

    def __init__(self, **options):
        super().__init__()
        self.emb = ParallelVocabEmbedding(10, 3, padding_idx=4, **options)
        self.head = nn.Linear(3, 1, bias=False)
        self.head.weight = self.emb.weight
        self.norm = nn.LayerNorm(3)

    def forward(self, ids):
        return self.norm(self.emb(ids)) * self.emb(ids)


class Training:
    """What PyTorch's own guide calls an application's state, with ``sharded_state_dict`` and ``local_state_dict`` added."""

    def __init__(self, model, optimizer=torch.optim.Adam):
        self.model, self.optimizer = model, optimizer(model.parameters(), lr=0.1)

    def state_dict(self):
        return {
            name: sharded_state_dict(self.model, state)
            for name, state in zip("mo", get_state_dict(self.model, self.optimizer), strict=True)
        }

    def load_state_dict(self, state):
        state = local_state_dict(state)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            self.model(torch.arange(12)).pow(3).sum().backward()
            self.optimizer.step()

    def rows(self):
        """The weight and its moments, this rank's rows without padding; and the number of steps."""
        emb = self.model.emb
        state = self.optimizer.state[emb.weight]
        start, stop = emb.partition.owned_range(emb.rank)
        held = [emb.weight.detach(), state["exp_avg"], state["exp_avg_sq"]]
        return [each[: stop - start] for each in held], (start, stop), int(state["step"])


def save_training(folder, how):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = dist.group.WORLD if how == "async_save" else mesh.get_group("tp")
    model = Tied(process_group=group, padded_vocab_size="even", init="global", reduction="all_reduce")
    if how == "ddp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the reducer's own making
            model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        assert isinstance(sharded_state_dict(model, model.state_dict())["module.emb.weight"], TableRows)
    training = Training(fully_shard(model, mesh=mesh["dp"]) if how == "fully_shard" else model)
    training.step(2)
    if how != "ddp":
        dcp.async_save({"app": training}, checkpoint_id=folder).result()
    else:
        dcp.save({"app": training}, checkpoint_id=folder)


@pytest.mark.parametrize("how", ["ddp", "async_save", "fully_shard"])
def test_adams_moments_for_any_number_of_ranks(world, tmp_path, how):
    """Saved and loaded as a ``Stateful``; training goes on from there. (``fully_shard`` is saved in the background too.)"""
    world(4)(save_training, str(tmp_path), how)
    whole = Training(Tied(init="global"))
    whole.step(2)
    loaded = []
    for rank, size in [(0, 1), (0, 3), (1, 3), (2, 3)]:
        loaded.append(Training(Tied(rank=rank, world_size=size, padded_vocab_size="even", init_base_seed=0)))
        dcp.load({"app": loaded[-1]}, checkpoint_id=tmp_path, no_dist=True)
    for steps in (2, 3):
        for training in loaded:
            rows, (start, stop), found = training.rows()
            assert found == steps
            for mine, expected in zip(rows, whole.rows()[0], strict=True):
                torch.testing.assert_close(mine, expected[start:stop])
        if steps == 2:
            whole.step()
            loaded = loaded[:1]
            loaded[0].step()


def test_what_wraps_a_model_changes_no_name():
    model = Tied()
    wrapped = torch.compile(model)
    for state in (model.state_dict(), wrapped.state_dict()):
        found = sharded_state_dict(wrapped, state)
        assert list(found) == list(state)
        assert sum(isinstance(each, TableRows) for each in found.values()) == 2


def test_state_dicts_that_cannot_be_split_are_refused():
    model = Tied(rank=1, world_size=2)
    training = Training(model)
    training.step()
    with pytest.raises(ValueError, match="name parameters as the model does, got numbers"):
        sharded_state_dict(model, training.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"hold emb.weight or head.weight, got \['model'\]"):
        sharded_state_dict(model, {"model": model.state_dict()})
    training = Training(model, torch.optim.Adafactor)
    training.step()
    with pytest.raises(ValueError, match=r"col_var must be one number or have one entry .* 5 rows, got \[1, 3\]"):
        training.state_dict()
    other = ParallelVocabEmbedding(10, 3, 0, 2)
    with pytest.raises(RuntimeError, match=r"own rows \[0, 5\) of 10, got rows \[5, 10\)"):
        other.load_state_dict(model.emb.sharded_state_dict())
