"""Rank and world size from real process groups: four gloo processes, their sub-groups, and a device mesh."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torch_impl import ParallelVocabEmbedding, partial_lookup, reduced_lookup
from torch_impl.process_group import resolve_rank


def test_without_a_group():
    assert resolve_rank(None, None, None) == (0, 1)
    assert resolve_rank(2, 3, None) == (2, 3)
    with pytest.raises(ValueError, match="rank must be given with world_size=3"):
        resolve_rank(None, 3, None)


def check_groups():
    rank, world = dist.get_rank(), dist.group.WORLD
    table = torch.cat([ParallelVocabEmbedding(24, 4, r, 4).weight.detach() for r in range(4)])
    emb = ParallelVocabEmbedding(24, 4, process_group=world)
    assert (emb.rank, emb.world_size) == (rank, 4)
    ids = torch.tensor([[0, 23, 5], [6, -1, 24]])
    total = emb(ids).detach()
    dist.all_reduce(total)
    assert torch.equal(total, table[ids.clamp(0, 23)] * ((ids >= 0) & (ids < 24)).unsqueeze(-1))

    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    emb = ParallelVocabEmbedding(24, 4, process_group=pairs[rank % 2])
    assert (emb.rank, emb.world_size, emb.weight.shape) == (rank // 2, 2, (12, 4))
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    emb = ParallelVocabEmbedding(24, 4, process_group=mesh.get_group("tp"))
    assert (emb.rank, emb.world_size) == (rank % 2, 2)
    assert ParallelVocabEmbedding(24, 4, rank, 4, world).rank == rank
    for error, match, arguments in (
        (TypeError, "member of", {"process_group": pairs[1 - rank % 2]}),
        (ValueError, "rank must agree with process_group", {"rank": (rank + 1) % 4, "process_group": world}),
        (ValueError, "got world_size=2, the group says 4", {"world_size": 2, "process_group": world}),
    ):
        with pytest.raises(error, match=match):
            ParallelVocabEmbedding(24, 4, **arguments)


def test_rank_and_world_size_come_from_groups(world):
    world(4)(check_groups)


def check_dtensors():
    mesh = dist.init_device_mesh("cpu", (2,))
    checked, emb = (ParallelVocabEmbedding(24, 4, process_group=dist.group.WORLD, check=c) for c in (True, False))
    ids = distribute_tensor(torch.arange(8), mesh, [Shard(0)])
    weight = DTensor.from_local(emb.weight.detach(), mesh, [Shard(0)])
    for call in (emb, checked, torch.compile(emb, backend="aot_eager")):
        with pytest.raises(
            TypeError, match=r"ids must be a plain tensor, got a DTensor \(Shard.* pass full_tensor\(\)"
        ):
            call(ids)
    options = {"process_group": dist.group.WORLD, "reduction": "all_reduce"}
    for look_up in (partial(partial_lookup, rank=emb.rank), partial(reduced_lookup, **options)):
        with pytest.raises(TypeError, match=r"weight must be a plain tensor, got a DTensor .* pass to_local\(\) of it"):
            look_up(weight, ids.full_tensor(), emb.partition)
        with pytest.raises(TypeError, match="ids must be a plain tensor"):
            look_up(emb.weight, ids, emb.partition)
        assert look_up(weight.to_local(), ids.full_tensor(), emb.partition).shape == (8, 4)


def test_dtensors_where_plain_tensors_are_meant(world):
    world(2)(check_dtensors)
