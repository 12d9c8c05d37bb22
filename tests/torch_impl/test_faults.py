"""Ranks that disagree, and ranks that die: every rank gets an error that says what happened; none waits for ever."""

import contextlib
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch_layers import equal_bits, on_ranks, ranks_of, whole_table

from torch_impl import ParallelVocabEmbedding

IDS = torch.arange(16).view(2, 8)
OTHER_IDS = IDS.clone()
OTHER_IDS[1, 3] = 40
DISAGREEMENTS = [  # what rank 1 has of its own: options, ids; and what all ranks say
    ({}, OTHER_IDS, r"the ids: ids\[1, 3\] is 11 on ranks 0, 2, 3; 40 on rank 1"),
    ({}, IDS.view(4, 4), r"shape of the ids: \(2, 8\) on ranks 0, 2, 3; \(4, 4\) on rank 1"),
    ({}, IDS.float(), "dtype of the ids: torch.int64 on ranks 0, 2, 3; torch.float"),
    ({}, [1, 2], ""),
    ({"vocab_size": 52}, IDS, "vocab_size: 48 on ranks 0, 2, 3; 52 on rank 1"),
    ({"emb_size": 6}, IDS, "emb_size: 4 on ranks 0, 2, 3; 6 on rank 1"),
    ({"dtype": torch.float16}, IDS, "dtype: torch.float32 on ranks 0, 2, 3; torch.float16 on rank 1"),
    ({"reduction": "none"}, IDS, "reduction: all_reduce on ranks 0, 2, 3; none on rank 1"),
]


def embedding(**options):
    options = {"vocab_size": 48, "emb_size": 4, "reduction": "all_reduce", "check": True, **options}
    return ParallelVocabEmbedding(process_group=dist.group.WORLD, **options)


@on_ranks(4)
def test_ranks_that_disagree():
    """Rank 1 differs from the others; all ranks say so, and the group works on."""
    table = whole_table(ranks_of(48, 4, 4))
    for options, ids, message in DISAGREEMENTS:
        emb, given = (embedding(**options), ids) if dist.get_rank() == 1 else (embedding(), IDS)
        with pytest.raises(ValueError, match=f"disagree about {message}"):
            emb(given)
        dist.barrier()
        assert equal_bits(embedding()(IDS), table[IDS]), message
    compiled = torch.compile(embedding(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"ids\[1, 3\] is 11 on ranks 0, 2, 3; 40 on rank 1"):
        compiled(OTHER_IDS if dist.get_rank() == 1 else IDS)


@on_ranks(4)
def test_ranks_with_the_same_rows():
    own = embedding(vocab_size=46, padded_vocab_size=48).weight.detach()  # the last rank has two rows of padding
    rank, rows = dist.get_rank(), ranks_of(48, 4, 4)
    unused = torch.ones_like(own)
    unused[rank] = 2
    for weight, alike in (
        (rows[0].weight, "0 and 1"),  # as broadcast
        (rows[1].weight if rank == 2 else own, "1 and 2"),
        (torch.ones_like(own), ""),
        (unused, ""),  # one row for all unused tokens, but for a token here and there
    ):
        emb = embedding(vocab_size=46, padded_vocab_size=48)
        emb.weight.data = weight.detach()
        message = f"ranks {alike} hold the same rows, where each rank must hold its own"
        for call in (emb, torch.compile(emb, fullgraph=True, backend="aot_eager")):
            with pytest.raises(ValueError, match=message) if alike else contextlib.nullcontext():
                call(torch.arange(8))


@on_ranks(2)
def test_no_gradient_leaves_no_check_out():
    emb, ids = embedding(vocab_size=11, reduction="none", padded_vocab_size="even"), torch.arange(3)
    with torch.no_grad():
        assert emb(ids).shape == (3, 4)
        with pytest.raises(ValueError, match="disagree about"):
            emb(ids + dist.get_rank())


def test_the_environment_has_every_layer_checked(monkeypatch):
    for value, check in (("1", True), ("0", False)):
        monkeypatch.setenv("PVE_CHECK", value)
        assert ParallelVocabEmbedding(48, 4).check == check
    monkeypatch.setenv("PVE_CHECK", "yes")
    with pytest.raises(ValueError, match="PVE_CHECK must be 0 or 1, got 'yes'"):
        ParallelVocabEmbedding(48, 4)


def lose_a_rank(reduction, exchange, where):
    """Rank 2 dies before it joins in; the others are told by the operation that they were in."""
    emb, ids = embedding(reduction=reduction, exchange=exchange, check=False), torch.arange(24).view(2, 12) * 2
    output = emb(ids)
    dist.barrier()
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    emb(ids) if where == "forward" else output.sum().backward()


@pytest.mark.parametrize(
    ("reduction", "exchange", "where", "operation", "named"),
    [
        ("all_reduce", "dense", "forward", "all_reduce", "dense"),
        ("all_reduce", "routed", "forward", "broadcast", "routed all_reduce"),
        ("reduce_scatter", "dense", "forward", "reduce_scatter", "dense"),
        ("reduce_scatter", "routed", "forward", "all_to_all_single", "routed reduce_scatter"),
        ("reduce_scatter", "dense", "backward", "all_gather", "dense"),
        ("reduce_scatter", "routed", "backward", "all_to_all_single", "routed reduce_scatter"),
    ],
)
def test_a_rank_that_dies(world, reduction, exchange, where, operation, named):
    *told, of_the_dead = world(3).errors(lose_a_rank, reduction, exchange, where)
    assert of_the_dead == "the process has ended"
    for rank, error in enumerate(told):
        assert f"RuntimeError: {operation} of the embedding's {where} ({named}) failed on rank {rank} of 3" in error
        assert "A rank has ended, does not answer, or runs another operation" in error
