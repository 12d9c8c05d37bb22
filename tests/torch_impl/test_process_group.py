"""Rank and world size with and without process groups; DTensors where plain tensors are meant."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch_layers import mesh_of

from torch_impl import ParallelVocabEmbedding, partial_lookup, reduced_lookup
from torch_impl.process_group import resolve_rank


def test_without_a_group():
    assert resolve_rank(None, None, None) == (0, 1)
    assert resolve_rank(2, 3, None) == (2, 3)
    with pytest.raises(ValueError, match="rank must be given with world_size=3"):
        resolve_rank(None, 3, None)


def check_dtensors():
    mesh = mesh_of(2)
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
