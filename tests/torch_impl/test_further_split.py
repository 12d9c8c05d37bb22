"""A layer's rows that ``fully_shard`` splits again over the other dimension of a mesh: numbers, checkpoints, files."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch_layers import mesh_of, on_ranks, over, rows_of, whole

from torch_impl import ParallelVocabEmbedding

VOCAB, EMB = 21, 3  # over 2 ranks 11 rows each, one of padding; of these 6 and 5 over 2 again
PLACES = {"process_group": {}, "device_mesh": {}, "device_mesh, padded": {"padded_vocab_size": 24}}


def layer(place, **options):
    options = {**over(place.partition(",")[0], mesh_of(2, 2)["tp"]), "padding_idx": 13, **PLACES[place], **options}
    return ParallelVocabEmbedding(VOCAB, EMB, **options)


def split(emb):
    return fully_shard(emb, mesh=mesh_of(2, 2)["dp"])


def whole_numbers(rows):
    return torch.stack([rows, rows + 1, rows + 2], 1)


@pytest.mark.parametrize("place", PLACES)
@on_ranks(4)
def test_reset_parameters_draws_the_same_numbers_and_padding_has_no_gradient(place):
    for init in ("per_rank", whole_numbers, "global"):
        expected = whole(layer(place, init=init).weight).detach().clone()
        emb, late = split(layer(place, init=init)), split(layer(place, init=init, device="meta"))
        with torch.no_grad():
            emb.weight.zero_()
        late.to_empty(device="cpu")
        for each in (emb, late):
            each.reset_parameters()
            assert torch.equal(whole(each.weight), expected), init
    emb.weight.grad = torch.ones_like(emb.weight)
    emb.zero_padding_grad()
    owned, _ = rows_of(emb, emb.weight.grad, torch.empty(VOCAB))
    assert owned.all()
    assert whole(emb.weight.grad).sum() == owned.numel()


def save(place, folder):
    emb = split(layer(place, init="global"))
    expected = whole(emb.weight)
    dcp.save(emb.sharded_state_dict("emb."), checkpoint_id=f"{folder}/dcp")
    with torch.no_grad():
        emb.weight.zero_()
    dcp.load(emb.sharded_state_dict("emb."), checkpoint_id=f"{folder}/dcp")
    assert torch.equal(whole(emb.weight), expected)
    path = f"{folder}/table.safetensors"
    with pytest.raises(ValueError, match="the table must not be split further, as by fully_shard, to be saved"):
        emb.save_table(path)
    emb.unshard()
    if mesh_of(2, 2).get_local_rank("dp") == 0:
        emb.save_table(path)
    emb.reshard()


@pytest.mark.parametrize("place", PLACES)
def test_checkpoints_and_files_hold_the_right_rows(world, tmp_path, place):
    world(4)(save, place, str(tmp_path))
    table = ParallelVocabEmbedding(VOCAB, EMB, init="global", padding_idx=13).weight.detach()
    for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3)):  # other numbers of ranks
        other = ParallelVocabEmbedding(VOCAB, EMB, rank, world_size)
        dcp.load(other.sharded_state_dict("emb."), checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert torch.equal(other.weight, table[other.partition.start(rank) : other.partition.stop(rank)])
    from_file = ParallelVocabEmbedding.from_table(tmp_path / "table.safetensors")
    assert torch.equal(from_file.weight, table)
