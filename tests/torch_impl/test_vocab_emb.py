"""Building the layer: what it holds, how it is drawn, what it refuses."""

import copy
import inspect
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch_layers import DTYPES, assert_compiled_is_the_same, assert_refused, ranks_of, whole_table

from shared import VocabPartition
from torch_impl import ParallelVocabEmbedding


def test_the_signature_is_the_promised_one():
    signature = inspect.signature(ParallelVocabEmbedding)
    assert " ".join(str(each.replace(annotation=each.empty)) for each in signature.parameters.values()) == (
        "vocab_size emb_size rank=None world_size=None process_group=None init_mean=0.0 init_std=1.0 init_base_seed=42 "
        "dtype=None device=None device_mesh=None reduction='none' exchange='auto' seq_dim=-1 invalid_ids='zero' "
        "padding_idx=None padded_vocab_size=None sparse=False init='per_rank' check=False "
        "gradient_accumulation_fusion=False"
    )
    keywords = [name for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert (keywords[0], len(keywords)) == ("device_mesh", 11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_rank_draws_from_its_own_seed_and_leaves_the_callers_state(dtype):
    for rank, seed in ((0, 7), (1, -(2**40)), (2, 2**63 - 9)):
        torch.manual_seed(1234)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        emb = ParallelVocabEmbedding(24, 5, rank, 3, None, 0.5, 0.02, seed, dtype)
        nn.init.zeros_(emb.weight)
        emb.reset_parameters()
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
        torch.manual_seed(seed + rank)
        expected = nn.init.normal_(torch.empty(8, 5, dtype=dtype), 0.5, 0.02)
        assert emb.weight.dtype == dtype
        assert torch.equal(emb.weight, expected)


def test_what_it_holds():
    emb = ParallelVocabEmbedding(20, 5, 1, 3, padding_idx=3, padded_vocab_size=24)
    assert isinstance(emb.weight, nn.Parameter)
    assert emb.weight.shape == (8, 5)
    assert emb.partition == VocabPartition(20, 3, 24)
    assert (emb.rank, emb.world_size, emb.vocab_size, emb.padded_vocab_size, emb.emb_size) == (1, 3, 20, 24, 5)
    assert list(emb.state_dict()) == ["weight"] == list(dict(emb.named_parameters()))
    assert not list(emb.buffers())
    assert repr(emb) == "ParallelVocabEmbedding(20, 5, rank=1, world_size=3, padded_vocab_size=24, padding_idx=3)"
    emb = ParallelVocabEmbedding(24, 5)
    assert (emb.rank, emb.world_size, emb.weight.shape) == (0, 1, (24, 5))


@pytest.mark.parametrize("init", ["per_rank", "global"])
def test_padding_and_padding_idx_are_zero_and_all_else_is_as_without_from_the_meta_device_too(init):
    options = {"init": init, "init_mean": 1.0}
    for rank in range(3):
        expected = ParallelVocabEmbedding(24, 5, rank, 3, **options).weight.detach().clone()
        if rank == 1:
            expected[1] = 0
        expected[22 - 8 * rank :] = 0
        build = partial(ParallelVocabEmbedding, 22, 5, rank, 3, padded_vocab_size=24, padding_idx=9, **options)
        emb, late = build(), build(device="meta")
        assert torch.equal(emb.weight, expected)
        assert late.weight.is_meta
        assert late(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 5)
        for each in (emb, late.to_empty(device="cpu")):
            nn.init.ones_(each.weight)
            each.reset_parameters()
            assert torch.equal(each.weight, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_is_trained_by_a_head_of_the_callers_own_unless_its_gradient_is_removed(compiled):
    emb = ParallelVocabEmbedding(10, 4, 3, 4, padded_vocab_size=12, padding_idx=9)
    emb.weight.main_grad = torch.ones(3, 4)
    optimizer = torch.optim.AdamW([emb.weight], lr=0.1)

    def loss(hidden):
        return (emb(torch.arange(-1, 13)).sum() + (hidden @ emb.weight.T).logsumexp(-1).sum()).square()

    (torch.compile(loss, backend="aot_eager") if compiled else loss)(torch.ones(2, 4)).backward()
    assert emb.weight.grad[1:].all()
    emb.zero_padding_grad()
    for gradient in (emb.weight.grad, emb.weight.main_grad):
        assert gradient[0].all()
        assert not gradient[1:].any()
    optimizer.step()
    assert emb.weight[0].all()
    assert not emb.weight[1:].any()
    ParallelVocabEmbedding(10, 4).zero_padding_grad()  # has no gradient


def test_bad_arguments_are_refused():
    def build(**options):
        return lambda: ParallelVocabEmbedding(**{"vocab_size": 24, "emb_size": 4, **options})

    of_four = "dtype must be float16, bfloat16, float32 or float64, got torch.int64"
    of_rows = r"a row for each of the row numbers .* \[24, 4\], got \[2\]"
    assert_refused(
        (ValueError, r"rank must be in .* \[0, 3\), got 3", build(rank=3, world_size=3)),
        (ValueError, "got 1; correct the rank or the world_size", build(rank=1)),
        (ValueError, "rank must be given with world_size=3", build(world_size=3)),
        (ValueError, "world_size must be at least 1", build(world_size=0)),
        (
            ValueError,
            "check=True compares the ranks of a process_group: pass it",
            build(rank=0, world_size=2, check=True),
        ),
        (TypeError, "check must be True or False", build(check="yes")),
        (TypeError, "process_group must be a torch.distributed.ProcessGroup", build(process_group="tp")),
        (TypeError, of_four, build(dtype=torch.int64)),
        (TypeError, "dtype must be", build(dtype=torch.float8_e4m3fn)),
        (ValueError, "reduction must be 'none' or 'all_reduce' or .* got 'sum'", build(reduction="sum")),
        (TypeError, "init must return a tensor, got list", build(init=lambda rows: [0.0])),
        (ValueError, of_rows, build(init=lambda rows: torch.ones(2))),
    )


def test_the_state_dict_of_another_rank_is_refused(tmp_path):
    """What rank 0 saved, loaded on every rank, would be the right rows for nobody else."""
    first, second = ranks_of(12, 4, 2)
    own = second.weight.detach().clone()
    torch.save(first.state_dict(), tmp_path / "rank0.pt")
    saved = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert list(saved) == ["weight"]
    refusal = r"weight must hold this rank's own rows \[6, 12\) of 12, got rows \[0, 6\) of 12"
    for options in ({}, {"assign": True}, {"strict": False}):
        with pytest.raises(RuntimeError, match=refusal):
            copy.deepcopy(second).load_state_dict(saved, **options)
    whole = nn.ModuleDict({"emb": pickle.loads(pickle.dumps(second))})
    with pytest.raises(RuntimeError, match=rf"emb\.{refusal}"):
        whole.load_state_dict(nn.ModuleDict({"emb": first}).state_dict())
    first.load_state_dict(saved)
    second.load_state_dict(dict(saved))  # without metadata, as from safetensors: nobody can know
    second.load_state_dict({"weight": own})
    assert torch.equal(second.weight, own)


def test_from_a_table_in_memory():
    build, whole = ParallelVocabEmbedding.from_embedding, nn.Embedding(10, 3, padding_idx=7, dtype=torch.bfloat16)
    before = whole.weight.detach().clone()
    ranks = [build(whole, r, 4, padded_vocab_size="even") for r in range(4)]
    ids = torch.arange(-1, 12).remainder(10)
    assert torch.equal(sum(emb(ids) for emb in ranks), whole(ids))
    assert [emb.padding_idx for emb in ranks] == [7] * 4
    assert not ranks[3].weight[1:].any()
    with torch.no_grad():
        ranks[0].weight.zero_()
    assert torch.equal(whole.weight, before)
    cast = build(whole.weight, dtype=torch.float64)
    assert torch.equal(cast.weight, before.double())
    assert (cast.padding_idx, cast.weight.is_leaf, cast.weight.requires_grad) == (None, True, True)
    assert_refused(
        (TypeError, r"table must be an nn\.Embedding or a tensor, got list", lambda: build([[1.0]])),
        (ValueError, r"table must be \[v, e\] and have storage, got \[4\]", lambda: build(torch.ones(4))),
        (ValueError, "have storage", lambda: build(torch.ones(4, 2, device="meta"))),
        (ValueError, "without max_norm", lambda: build(nn.Embedding(4, 2, max_norm=1.0))),
        (ValueError, "divisible", lambda: build(torch.ones(5, 2), 0, 2)),
    )


def test_the_names_of_nn_embedding():
    emb = ParallelVocabEmbedding(10, 4, 0, 2)
    emb.num_embeddings = 10  # as libraries do that found nothing to resize
    assert (emb.num_embeddings, emb.embedding_dim) == (10, 4)
    with pytest.raises(ValueError, match=r"must stay 10, got 5 \(weight has 5 rows, those of one rank\): resize the"):
        emb.num_embeddings = 5


def row_numbers(rows):
    return torch.stack([rows, 10 * rows], 1)


@pytest.mark.parametrize(("world_size", "padded"), [(1, None), (4, 24)])  # of 24, two ranks have padding only
def test_a_callable_is_asked_for_the_ranks_rows(world_size, padded):
    asked = []

    def init(rows):
        asked.extend(rows.tolist())
        return row_numbers(rows)

    ranks = ranks_of(10, 2, world_size, padded_vocab_size=padded, init=init, padding_idx=7)
    assert asked == list(range(10))
    expected = row_numbers(torch.arange(10)).float()
    expected[7] = 0
    assert torch.equal(whole_table(ranks), expected)
    assert sum(emb.weight.sum() for emb in ranks) == expected.sum()  # padding is zero
    copied = copy.deepcopy(ranks[0])
    nn.init.zeros_(copied.weight)
    copied.reset_parameters()
    assert torch.equal(copied.weight, expected[: len(copied.weight)])
    assert_compiled_is_the_same(copied, torch.arange(2), backend="aot_eager")


def test_a_layer_is_pickled_with_the_name_of_its_callable():
    emb = ParallelVocabEmbedding(10, 1, init=torch.atleast_2d, rank=9, world_size=10)
    assert pickle.loads(pickle.dumps(emb)).init is torch.atleast_2d
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(ParallelVocabEmbedding(10, 1, init=lambda rows: rows[:, None]))


def test_without_first_numbers_only_padding_is_written():
    emb = ParallelVocabEmbedding(10, 2, 3, 4, padded_vocab_size="even", init=None, init_std=5.0)
    assert not emb.weight[1:].any()
    nn.init.ones_(emb.weight)
    emb.reset_parameters()
    assert emb.weight.tolist() == [[1, 1], [0, 0], [0, 0]]
