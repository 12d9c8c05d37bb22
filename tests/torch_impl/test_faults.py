"""Ranks that disagree, and ranks that die: every rank gets an error that says what happened; none waits for ever."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from marks import slower

from torch_impl import ParallelVocabEmbedding


def embedding(**options):
    options = {"vocab_size": 48, "emb_size": 4, "reduction": "all_reduce", "check": True, **options}
    return ParallelVocabEmbedding(
        options.pop("vocab_size"), options.pop("emb_size"), process_group=dist.group.WORLD, **options
    )


def check_disagreement(options_of_rank_1, ids_of_rank_1, message, compiled):
    """Rank 1 differs from the others; all ranks say so, and the group works on."""
    ids = torch.arange(16).view(2, 8)
    own = dist.get_rank() == 1
    emb = embedding(**(options_of_rank_1 if own else {}))
    given = (ids if ids_of_rank_1 is None else ids_of_rank_1) if own else ids
    call = torch.compile(emb, fullgraph=True, backend="aot_eager") if compiled else emb
    with pytest.raises(ValueError, match=message):
        call(given)
    dist.barrier()
    agreed = embedding()
    table = torch.cat(
        [ParallelVocabEmbedding(48, 4, r, agreed.world_size).weight.detach() for r in range(agreed.world_size)]
    )
    assert torch.equal(agreed(ids), table[ids])


OTHER_IDS = torch.arange(16).view(2, 8).clone()
OTHER_IDS[1, 3] = 40


@pytest.mark.parametrize(
    ("options", "ids", "message"),
    [
        ({}, OTHER_IDS, r"disagree about the ids: ids\[1, 3\] is 11 on ranks 0, 2, 3; 40 on rank 1"),
        (
            {},
            torch.arange(16).view(4, 4),
            r"disagree about shape of the ids: \(2, 8\) on ranks 0, 2, 3; \(4, 4\) on rank 1",
        ),
        (
            {},
            torch.arange(16.0).view(2, 8),
            "disagree about dtype of the ids: torch.int64 on ranks 0, 2, 3; torch.float",
        ),
        ({}, [1, 2], "disagree about"),
        ({"vocab_size": 52}, None, "disagree about vocab_size: 48 on ranks 0, 2, 3; 52 on rank 1"),
        ({"emb_size": 6}, None, "disagree about emb_size: 4 on ranks 0, 2, 3; 6 on rank 1"),
        (
            {"dtype": torch.float16},
            None,
            "disagree about dtype: torch.float32 on ranks 0, 2, 3; torch.float16 on rank 1",
        ),
        (
            {"reduction": "reduce_scatter"},
            None,
            "disagree about reduction: all_reduce on ranks 0, 2, 3; reduce_scatter",
        ),
        ({"reduction": "none"}, None, "disagree about reduction: all_reduce on ranks 0, 2, 3; none on rank 1"),
        ({"exchange": "routed"}, None, "disagree about exchange: auto on ranks 0, 2, 3; routed on rank 1"),
        ({"padding_idx": 3}, None, "disagree about padding_idx: None on ranks 0, 2, 3; 3 on rank 1"),
    ],
)
def test_ranks_that_disagree(world, options, ids, message):
    world(4)(check_disagreement, options, ids, message, False)


def test_ranks_that_disagree_when_compiled(world):
    world(2)(check_disagreement, {}, OTHER_IDS, r"ids\[1, 3\] is 11 on rank 0; 40 on rank 1", True)


def check_few_ids_without_a_gradient():
    """What looks few ids up in little time leaves no check out, on ranks with padding and without."""
    emb = embedding(vocab_size=11, reduction="none", padded_vocab_size="even")
    ids = torch.arange(3)
    with torch.no_grad():
        assert emb(ids).shape == (3, 4)
        for other in (ids + 1, torch.arange(70)):
            with pytest.raises(ValueError, match="disagree about"):
                emb(other if dist.get_rank() else ids)


def test_few_ids_without_a_gradient(world):
    world(2)(check_few_ids_without_a_gradient)


def check_same_rows(how, alike):
    emb = embedding(vocab_size=46, padded_vocab_size=48)  # the last rank has two rows of padding
    if how == "broadcast":
        dist.broadcast(emb.weight.detach(), 0)
    elif how == "of rank 1 on rank 2":
        rows = ParallelVocabEmbedding(48, 4, 1, 4).weight
        emb.weight.data = rows.detach() if emb.rank == 2 else emb.weight.data
    elif how == "constant":
        torch.nn.init.ones_(emb.weight)
    else:  # one row for all unused tokens, but for a token here and there
        torch.nn.init.ones_(emb.weight)
        emb.weight.data[emb.rank] = 2
    for call in (emb, torch.compile(emb, fullgraph=True, backend="aot_eager")):
        refused = pytest.raises(
            ValueError, match=f"ranks {alike} hold the same rows, where each rank must hold its own"
        )
        with refused if alike else contextlib.nullcontext():
            call(torch.arange(8))


@pytest.mark.parametrize(
    ("how", "alike"), [("broadcast", "0 and 1"), ("of rank 1 on rank 2", "1 and 2"), ("constant", ""), ("unused", "")]
)
def test_ranks_with_the_same_rows(world, how, alike):
    world(4)(check_same_rows, how, alike)


def check_switch():
    os.environ["PVE_CHECK"] = "1"
    try:
        assert embedding(check=False).check
        os.environ["PVE_CHECK"] = "yes"
        with pytest.raises(ValueError, match="PVE_CHECK must be 0 or 1, got 'yes'"):
            embedding(check=False)
    finally:
        del os.environ["PVE_CHECK"]
    assert not embedding(check=False).check


def test_the_environment_switch(world):
    world(2)(check_switch)


def test_check_needs_a_group():
    with pytest.raises(ValueError, match="check=True compares the ranks of a process_group: pass it"):
        ParallelVocabEmbedding(48, 4, 0, 2, check=True)
    with pytest.raises(TypeError, match="check must be True or False"):
        ParallelVocabEmbedding(48, 4, check="yes")


# The last rank dies before it joins in; the others are told by the operation that they were in.
RANK = """
    import os, signal, sys
    from datetime import timedelta
    import torch, torch.distributed as dist
    from torch_impl import ParallelVocabEmbedding

    rendezvous, rank, reduction, exchange, where = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3,
                            timeout=timedelta(seconds=20))
    emb = ParallelVocabEmbedding(48, 4, process_group=dist.group.WORLD, reduction=reduction, exchange=exchange)
    ids = torch.arange(24).view(2, 12) * 2
    output = emb(ids)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        emb(ids) if where == "forward" else output.sum().backward()
    except RuntimeError as error:
        print(error)
        os._exit(3)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("reduction", "exchange", "where", "operation"),
    [
        slower("all_reduce", "dense", "forward", "all_reduce of the embedding's forward (dense) failed on rank"),
        slower(
            "all_reduce", "routed", "forward", "broadcast of the embedding's forward (routed all_reduce) failed on rank"
        ),
        slower(
            "reduce_scatter", "dense", "forward", "reduce_scatter of the embedding's forward (dense) failed on rank"
        ),
        slower(
            "reduce_scatter",
            "routed",
            "forward",
            "all_to_all_single of the embedding's forward (routed reduce_scatter)",
        ),
        slower("reduce_scatter", "dense", "backward", "all_gather of the embedding's backward (dense) failed on rank"),
        (
            "reduce_scatter",
            "routed",
            "backward",
            "all_to_all_single of the embedding's backward (routed reduce_scatter)",
        ),
    ],
)
def test_a_rank_that_dies(tmp_path, reduction, exchange, where, operation):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    command = [sys.executable, str(script), str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen([*command, str(rank), reduction, exchange, where], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    outputs = [process.communicate(timeout=timedelta(seconds=60).total_seconds())[0] for process in ranks]
    assert ranks[2].returncode == -signal.SIGKILL
    for rank in (0, 1):
        assert ranks[rank].returncode == 3, outputs[rank]
        assert operation in outputs[rank]
        assert f"rank {rank} of 3" in outputs[rank]
        assert "A rank has ended, does not answer, or runs another operation" in outputs[rank]
