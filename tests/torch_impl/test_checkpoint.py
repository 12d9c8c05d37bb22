"""torch.distributed.checkpoint: what some ranks saved, others load, however they pad."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from torch_impl import ParallelVocabEmbedding


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
