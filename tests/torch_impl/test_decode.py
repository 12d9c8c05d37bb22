"""Decoding over a split vocabulary: the oracle's ids, on every rank, without the logits travelling."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch_layers import assert_refused

from shared import VocabPartition
from shared.proof import head_oracle
from torch_impl import parallel_argmax, parallel_sample, parallel_top_k

V = 21  # padded to 24, of 4 ranks the last has 3 ids; padded to 28 it has none


def logits_of(dtype, padded):
    """Few distinct values, so that ties are many; special ones; padding that would win if it were looked at."""
    x = np.random.default_rng(0).integers(-3, 4, (40, padded)).astype(np.float64) / 2
    x[0, 3], x[1], x[2, 4], x[3, 20], x[4, 6:] = np.nan, -np.inf, np.inf, np.nan, -np.inf
    x[5, :V], x[6, 2], x[7, [9, 11]] = 0.0, -np.nan, (np.inf, np.nan)
    x[5, ::2] = -0.0
    x[:, V:] = np.resize([np.inf, np.nan, 1e30], padded - V)
    return torch.from_numpy(x).to(dtype).view(4, 10, padded)


def own_columns(x):
    group = dist.group.WORLD if dist.is_initialized() else None
    partition = VocabPartition(V, group.size() if group else 1, x.shape[-1])
    rank = group.rank() if group else 0
    return x[..., partition.start(rank) : partition.stop(rank)], partition, group


def check_top_k_and_argmax():
    for dtype, padded in ((torch.float32, 28), (torch.bfloat16, 24), (torch.float16, 24)):
        x = logits_of(dtype, padded)
        own, partition, group = own_columns(x)
        untouched = own.clone()
        for k in (1, 4, 13, V):
            values, ids = parallel_top_k(own, k, partition, group)
            expected_values, expected_ids = head_oracle.top_k(x.float().numpy(), k, V)
            np.testing.assert_array_equal(ids, expected_ids)
            np.testing.assert_array_equal(values.float(), expected_values)
            assert (values.dtype, ids.dtype) == (dtype, torch.int64)
        np.testing.assert_array_equal(parallel_argmax(own, partition, group), head_oracle.argmax(x.float().numpy(), V))
        np.testing.assert_array_equal(own.float(), untouched.float())
        assert parallel_argmax(own[:0], partition, group).shape == (0, 10)


def check_sampling():
    rng = np.random.default_rng(1)
    for dtype, padded in ((torch.float32, 24), (torch.bfloat16, 24), (torch.float64, 28)):
        x = logits_of(dtype, padded)
        own, partition, group = own_columns(x)
        for uniform in (rng.random((4, 10)), np.zeros((4, 10)), np.full((4, 10), 1 - 2.0**-53)):
            drawn = parallel_sample(own, partition, group, uniform=torch.from_numpy(uniform))
            np.testing.assert_array_equal(drawn, head_oracle.sample(x.double().numpy(), uniform, V))


@pytest.mark.parametrize("check", [check_top_k_and_argmax, check_sampling])
def test_every_rank_has_the_oracles_ids(world, check):
    check()
    world(4)(check)


def test_samples_have_the_probabilities_of_the_logits():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(20000, 4)
    drawn = parallel_sample(logits, VocabPartition(4, 1), None, uniform=(torch.arange(20000) + 0.5) / 20000)
    assert torch.bincount(drawn, minlength=4).tolist() == pytest.approx([2000, 4000, 0, 14000], abs=1)


def check_bytes():
    """What is sent grows with k, never with the vocabulary."""
    sent = []
    for vocab_size in (64, 4096):
        partition = VocabPartition(vocab_size, dist.get_world_size())
        logits = torch.randn(10, partition.rows_per_rank)
        calls = (
            lambda: parallel_top_k(logits, 5, partition, dist.group.WORLD),  # noqa: B023
            lambda: parallel_argmax(logits, partition, dist.group.WORLD),  # noqa: B023
            lambda: parallel_sample(logits, partition, dist.group.WORLD, uniform=torch.full((10,), 0.5)),  # noqa: B023
        )
        for call in calls:
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
                call()
            collectives = [e for e in recorded.events() if e.name.startswith("gloo:")]
            sent.append([(e.name, e.input_shapes) for e in collectives])
    return sent


def test_what_is_sent(world):
    for sent in world(4)(check_bytes):
        assert sent[:3] == sent[3:]
        assert [len(each) for each in sent[:3]] == [1, 1, 2]


def test_what_is_refused():
    x, whole, halves = torch.zeros(2, 12), VocabPartition(12, 1), VocabPartition(12, 2)
    assert_refused(
        (ValueError, "own 6 columns, got 12", lambda: parallel_argmax(x, halves, None)),
        (ValueError, "process_group must be given", lambda: parallel_argmax(x[:, :6], halves, None)),
        (ValueError, r"k must be in \[1, vocab_size\] = \[1, 12\], got 13", lambda: parallel_top_k(x, 13, whole, None)),
        (TypeError, "k must be an integer", lambda: parallel_top_k(x, 1.0, whole, None)),
        (TypeError, "logits must be float16, bfloat16 or float32", lambda: parallel_argmax(x.double(), whole, None)),
        (TypeError, "logits must be", lambda: parallel_sample(x.int(), whole, None, uniform=torch.zeros(2))),
        (TypeError, "uniform must be", lambda: parallel_sample(x, whole, None, uniform=0.5)),
        (ValueError, "uniform must be one a token", lambda: parallel_sample(x, whole, None, uniform=torch.zeros(3))),
        (ValueError, r"uniform .* in \[0, 1\)", lambda: parallel_sample(x, whole, None, uniform=torch.ones(2))),
    )
