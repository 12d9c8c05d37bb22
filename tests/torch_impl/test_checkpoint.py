"""torch.distributed.checkpoint: what some ranks saved, others load, however they pad."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch_layers import Model, assert_refused, mesh_of, over, rows_of, without_warnings

from torch_impl import ParallelVocabEmbedding, local_state_dict, sharded_state_dict
from torch_impl.table_rows import TableRows


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
    on_meta, layer = ParallelVocabEmbedding(10, 3, device="meta"), ParallelVocabEmbedding(10, 3)
    as_megatron_calls = partial(layer.sharded_state_dict, prefix="", sharded_offsets=(), metadata={})
    assert_refused(
        (TypeError, "save and load alone", lambda: torch.add(rows, 1)),
        (ValueError, "call to_empty", on_meta.sharded_state_dict),
        (TypeError, "torch_impl.adapters.megatron.VocabParallelEmbedding writes and reads", as_megatron_calls),
    )


class Tied(Model):
    """Beside the layer a head that is the same parameter, and something that is not split."""

    def __init__(self, **options):
        super().__init__(ParallelVocabEmbedding(10, 3, padding_idx=4, **options))
        self.head = nn.Linear(3, 1, bias=False)
        self.head.weight = self.emb.weight


class Training:
    """What PyTorch's own guide calls an application's state; for plain tables with the two conversions added."""

    def __init__(self, model, optimizer=torch.optim.Adam, converts=True):
        self.model, self.optimizer, self.converts = model, optimizer(model.parameters(), lr=0.1), converts

    def state_dict(self):
        states = get_state_dict(self.model, self.optimizer)
        return {
            name: sharded_state_dict(self.model, state) if self.converts else state
            for name, state in zip("mo", states, strict=True)
        }

    def load_state_dict(self, state):
        state = local_state_dict(state) if self.converts else state
        set_state_dict(self.model, self.optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.arange(12)).pow(3).sum().backward()
        self.optimizer.step()
        return self

    def assert_follows(self, expected, steps):
        """The weight and its moments are the rank's rows of the expected ones."""
        emb, reference = self.model.emb, expected.model.emb
        found, wanted = self.optimizer.state[emb.weight], expected.optimizer.state[reference.weight]
        assert int(found["step"]) == steps
        torch.testing.assert_close(*rows_of(emb, emb.weight, reference.weight))
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(*rows_of(emb, found[name], wanted[name]))


DTENSOR = {"place": "device_mesh", "converts": False}  # without padding it needs no conversion
HOWS = {  # how four ranks save
    "ddp": {"sizes": (2, 2), "wrapper": "ddp"},
    "async_save": {"sizes": (4,)},
    "fully_shard": {"sizes": (2, 2), "wrapper": "fully_shard"},
    "device_mesh": {"sizes": (4,), **DTENSOR},
    "device_mesh, fully_shard": {"sizes": (2, 2), "wrapper": "fully_shard", **DTENSOR},
    "device_mesh, padded": {"sizes": (4,), "place": "device_mesh", "padded_vocab_size": 16},
}


def training_of(sizes, wrapper=None, place="process_group", converts=True, **options):
    mesh = mesh_of(*sizes)
    model = Tied(reduction="all_reduce", **over(place, mesh["tp"] if len(sizes) > 1 else mesh), **options)
    if wrapper == "ddp":
        with without_warnings():  # of the reducer's own making
            model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        assert isinstance(sharded_state_dict(model, model.state_dict())["module.emb.weight"], TableRows)
    elif wrapper == "fully_shard":
        model = fully_shard(model, mesh=mesh["dp"])
    return Training(model, converts=converts)


def save_training(folder, how):
    state = {"app": training_of(**HOWS[how], init="global").step().step()}
    if how in ("async_save", "fully_shard"):
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)


def check_resumed(training, folder, **options):
    dcp.load({"app": training}, checkpoint_id=folder, **options)
    expected = Training(Tied(init="global")).step().step()
    training.assert_follows(expected, 2)
    if training.model.emb.reduction == "all_reduce" or training.model.emb.world_size == 1:
        training.step().assert_follows(expected.step(), 3)  # goes on as if it had never stopped


def load_training(folder, how):
    check_resumed(training_of(**how, init_base_seed=0), folder)


@pytest.mark.parametrize("how", HOWS)
def test_adams_moments_for_any_number_of_ranks(world, tmp_path, how):
    world(4)(save_training, str(tmp_path), how)
    for rank, size, padded in ((0, 3, "even"), (2, 3, "even"), (2, 3, 30), (0, 1, None)):  # of 30 it owns none
        model = Tied(rank=rank, world_size=size, padded_vocab_size=padded, init_base_seed=0)
        check_resumed(Training(model), tmp_path, no_dist=True)
    if how == "ddp":
        world(3)(load_training, str(tmp_path), {"sizes": (3,), "place": "device_mesh"})
    elif "device_mesh" in how:
        world(4)(load_training, str(tmp_path), HOWS["device_mesh, fully_shard"])


def test_what_wraps_a_model_changes_no_name():
    model = Tied()
    wrapped = torch.compile(model)
    for state in (model.state_dict(), wrapped.state_dict()):
        found = sharded_state_dict(wrapped, state)
        assert list(found) == list(state)
        assert sum(isinstance(each, TableRows) for each in found.values()) == 2


def test_state_dicts_that_cannot_be_split_are_refused():
    model, other = Tied(rank=1, world_size=2), ParallelVocabEmbedding(10, 3, 0, 2)
    adam, adafactor = (Training(model, optimizer).step() for optimizer in (torch.optim.Adam, torch.optim.Adafactor))
    nested, of_rank_1 = {"model": model.state_dict()}, model.emb.sharded_state_dict()
    numbers = "name parameters as the model does, got numbers"
    no_table = r"hold emb.weight or head.weight, got \['model'\]"
    by_columns = r"col_var must be one number or have one entry .* 5 rows, got \[1, 3\]"
    assert_refused(
        (ValueError, numbers, lambda: sharded_state_dict(model, adam.optimizer.state_dict())),
        (ValueError, no_table, lambda: sharded_state_dict(model, nested)),
        (ValueError, by_columns, adafactor.state_dict),
        (RuntimeError, r"own rows \[0, 5\) of 10, got rows \[5, 10\)", lambda: other.load_state_dict(of_rank_1)),
    )
