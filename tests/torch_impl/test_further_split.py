"""A layer's rows that ``fully_shard`` splits again over the other dimension of a mesh: numbers, checkpoints, files."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

from torch_impl import ParallelVocabEmbedding

VOCAB, EMB = 21, 3  # over 2 ranks 11 rows each, one of padding; of these 6 and 5 over 2 again


def layer(mesh, **options):
    options = {"padded_vocab_size": "even", "padding_idx": 13, **options}
    return ParallelVocabEmbedding(VOCAB, EMB, process_group=mesh.get_group("tp"), **options)


def mesh_of_four():
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def whole_numbers(rows):
    return torch.stack([rows, rows + 1, rows + 2], 1)


def check_numbers(init):
    init = whole_numbers if init == "callable" else init
    mesh = mesh_of_four()
    expected = layer(mesh, init=init).weight.detach().clone()
    emb = layer(mesh, init=init, init_base_seed=42)
    fully_shard(emb, mesh=mesh["dp"])
    with torch.no_grad():
        emb.weight.zero_()
    emb.reset_parameters()
    assert torch.equal(emb.weight.full_tensor(), expected)


@pytest.mark.parametrize("init", ["per_rank", "callable", pytest.param("global", marks=pytest.mark.slow)])
def test_reset_parameters_draws_the_same_numbers(world, init):
    world(4)(check_numbers, init)


def check_padding_grad():
    mesh = mesh_of_four()
    emb = layer(mesh)
    fully_shard(emb, mesh=mesh["dp"])
    emb.weight.grad = torch.ones_like(emb.weight)
    emb.zero_padding_grad()
    expected = torch.ones(11, EMB)
    expected[11 - emb.rank :] = 0
    assert torch.equal(emb.weight.grad.full_tensor(), expected)


def test_the_gradient_of_padding_is_removed(world):
    world(4)(check_padding_grad)


def check_meta_init():
    mesh = mesh_of_four()
    expected = layer(mesh).weight.detach().clone()
    emb = layer(mesh, device="meta")
    fully_shard(emb, mesh=mesh["dp"])
    emb.to_empty(device="cpu")
    emb.reset_parameters()
    assert torch.equal(emb.weight.full_tensor(), expected)


def test_meta_then_fully_shard_then_reset(world):
    world(4)(check_meta_init)


def check_checkpoint(folder):
    mesh = mesh_of_four()
    emb = layer(mesh, init="global")
    fully_shard(emb, mesh=mesh["dp"])
    expected = emb.weight.full_tensor()
    dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=folder)
    with torch.no_grad():
        emb.weight.zero_()
    dcp.load(emb.sharded_state_dict("emb."), checkpoint_id=folder)
    assert torch.equal(emb.weight.full_tensor(), expected)


def test_dcp_saves_and_loads_the_right_rows(world, tmp_path):
    world(4)(check_checkpoint, str(tmp_path))
    table = ParallelVocabEmbedding(VOCAB, EMB, init="global", padding_idx=13).weight.detach()
    other = ParallelVocabEmbedding(VOCAB, EMB)
    dcp.load(other.sharded_state_dict("emb."), checkpoint_id=str(tmp_path))
    assert torch.equal(other.weight, table)
    for rank in range(3):  # another number of ranks
        other = ParallelVocabEmbedding(VOCAB, EMB, rank, 3)
        dcp.load(other.sharded_state_dict("emb."), checkpoint_id=str(tmp_path))
        assert torch.equal(other.weight, table[7 * rank : 7 * rank + 7])


def check_files(path):
    mesh = mesh_of_four()
    emb = layer(mesh, init="global")
    fully_shard(emb, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="the table must not be split further, as by fully_shard, to be saved"):
        emb.save_table(path)
    emb.unshard()
    if mesh.get_local_rank("dp") == 0:
        emb.save_table(path)
    emb.reshard()


def test_a_file_takes_what_is_not_split(world, tmp_path):
    path = str(tmp_path / "table.safetensors")
    world(4)(check_files, path)
    table = ParallelVocabEmbedding(VOCAB, EMB, init="global", padding_idx=13).weight
    assert torch.equal(ParallelVocabEmbedding.from_table(path).weight, table)
