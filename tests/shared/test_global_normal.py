"""Numbers that depend on the seed and the row alone: the same bits everywhere, and normally distributed."""

import hashlib
import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import shared.global_normal as global_normal
from shared.bits import DTYPES, unsigned_view
from shared.global_normal import normal_rows

FLOAT32, FLOAT64 = DTYPES["float32"], DTYPES["float64"]


@pytest.mark.parametrize(
    ("start", "stop", "emb_size", "dtype", "seed", "mean", "std", "sha256"),
    [
        (0, 256, 64, "float32", 42, 0.0, 1.0, "7728f44432178dc6"),
        (0, 256, 64, "bfloat16", 42, 0.0, 0.02, "173f33f3b86755fe"),
        (100, 200, 7, "float16", -1, 0.0, 1.0, "4a837cc36ef0b471"),
        (2**40, 2**40 + 9, 1, "float64", 2**63 - 1, 1.5, 2.0, "30831b4ffd1e526b"),
        (3, 5, 150001, "float32", 0, 0.0, 1.0, "16f0f8978feee2b2"),
    ],
)
def test_golden_hashes(start, stop, emb_size, dtype, seed, mean, std, sha256):
    rows = normal_rows(start, stop, emb_size, DTYPES[dtype], seed, mean, std)
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == sha256


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 90), min_size=2, max_size=6).map(sorted),
    emb_size=st.sampled_from([1, 2, 3, 8, 33]),
    first=st.sampled_from([0, 2**31 - 40, 2**45]),
)
def test_any_cut_gives_the_same_rows(cuts, emb_size, first):
    whole = normal_rows(first, first + 90, emb_size, FLOAT32, 7)
    for start, stop in itertools.pairwise(cuts):
        np.testing.assert_array_equal(normal_rows(first + start, first + stop, emb_size, FLOAT32, 7), whole[start:stop])


def test_blocks_and_threads_do_not_show(monkeypatch):
    whole = normal_rows(0, 300, 50, FLOAT64, 3)
    monkeypatch.setattr(global_normal, "_PAIRS", 10)  # rows wider than a block too
    np.testing.assert_array_equal(normal_rows(0, 300, 50, FLOAT64, 3), whole)
    monkeypatch.setattr(global_normal.os, "sched_getaffinity", lambda _: {0})
    np.testing.assert_array_equal(normal_rows(0, 300, 50, FLOAT64, 3), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_std_are_applied_in_float64_and_rounded_once(dtype):
    exact = normal_rows(0, 200, 32, FLOAT64, 5) * 0.37 + 0.21
    found = normal_rows(0, 200, 32, DTYPES[dtype], 5, 0.21, 0.37)
    # To the nearest: no neighbour is nearer, and of two equally near the even one is taken.
    bits = unsigned_view(found)
    for neighbour in (bits + bits.dtype.type(1), bits - bits.dtype.type(1)):
        other = neighbour.view(found.dtype).astype(np.float64)
        mine, its = np.abs(found.astype(np.float64) - exact), np.abs(other - exact)
        assert ((mine < its) | ((mine == its) & (bits % 2 == 0)) | (found == 0)).all()


def test_it_fills_just_what_it_is_given():
    memory = np.full((12, 5), np.nan, ml_dtypes.bfloat16)
    assert normal_rows(4, 10, 5, memory.dtype, 1, out=memory[2:8]) is not None
    np.testing.assert_array_equal(memory[2:8], normal_rows(4, 10, 5, memory.dtype, 1))
    assert np.isnan(memory[[0, 1, 8, 9, 10, 11]].astype(np.float32)).all()
    assert normal_rows(4, 4, 5, FLOAT32, 1).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1, 3, 4, FLOAT32, 0), ValueError, "from 0 on, got -1 and 3"),
        ((4, 3, 4, FLOAT32, 0), ValueError, "in order"),
        ((0, 3, 0, FLOAT32, 0), ValueError, "emb_size must be at least 1"),
        ((0, 3, 4, FLOAT32, 2**63), ValueError, "seed must be in"),
        ((0, 3, 4, FLOAT32, 1.5), TypeError, "seed must be an integer"),
        ((0, 3, 4, np.dtype(np.int32), 0), ValueError, "dtype must be one of"),
        ((0, 3, 4, FLOAT32, 0, 0.0, 1.0, np.zeros((3, 5), np.float32)), ValueError, "out must be C-contiguous"),
        ((0, 3, 4, FLOAT32, 0, 0.0, 1.0, np.zeros((4, 3), np.float32).T), ValueError, "out must be C-contiguous"),
        ((0, 3, 4, FLOAT32, 0, 0.0, 1.0, np.zeros((3, 4))), ValueError, "of float64"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        normal_rows(*arguments)


def test_they_are_normally_distributed():
    """Also far out, where a coarse logarithm would show, over seeds, and in both halves of Box-Muller's pairs."""
    pairs = normal_rows(0, 500_000, 2, FLOAT64, 11)
    for bound in (2, 3, 4):
        beyond, expected = int((np.abs(pairs) > bound).sum()), 2 * stats.norm.sf(bound)
        assert stats.binomtest(beyond, pairs.size, expected).pvalue > 0.001, bound
    for numbers, *distribution in (
        (pairs[:, 0], "norm"),
        (pairs[:, 1], "norm"),
        (np.arctan2(pairs[:, 1], pairs[:, 0]), "uniform", (-np.pi, 2 * np.pi)),
        ((pairs**2).sum(axis=1), "chi2", (2,)),
    ):
        assert stats.kstest(numbers, *distribution).pvalue > 0.01, distribution
    # Of right numbers the test's own p-values are uniformly distributed, whatever the seed.
    samples = (normal_rows(0, 2000, 10, FLOAT64, seed).ravel() for seed in range(-25, 25))
    assert stats.kstest([stats.kstest(each, "norm").pvalue for each in samples], "uniform").pvalue > 0.01


def test_neighbours_and_seeds_are_not_correlated():
    rows = normal_rows(0, 100_000, 6, FLOAT64, 21)
    others = {
        "columns": (rows[:, :-1], rows[:, 1:]),
        "rows": (rows[:-1], rows[1:]),
        "seeds": (rows, normal_rows(0, 100_000, 6, FLOAT64, 22)),
        "signs of seeds": (rows, normal_rows(0, 100_000, 6, FLOAT64, -21)),
        "squares": (rows[:, :-1] ** 2, rows[:, 1:] ** 2),
    }
    for name, (left, right) in others.items():
        assert abs(stats.pearsonr(left.ravel(), right.ravel()).statistic) < 4 / math.sqrt(left.size), name
    assert len(np.unique(rows)) == rows.size


def test_logarithm_sine_and_cosine_are_right_to_a_few_ulp():
    """Against 80-bit numbers; the least uniform number is 2**-53, which gives 8.57, not an infinity."""
    rng = np.random.default_rng(0)
    edges = [2.0**-53, 0.5, math.sqrt(0.5), 1.0]
    x = np.concatenate([rng.random(3000), rng.random(300) * 1e-9, 1 - rng.random(300) * 1e-9, edges])
    exact = np.log(x.astype(np.longdouble)).astype(np.float64)
    assert (np.abs(global_normal._log(x.copy()) - exact) <= 3 * np.spacing(np.abs(exact))).all()
    assert global_normal._log(np.ones(1))[0] == 0
    words = np.concatenate([rng.integers(0, 2**64, 3000, np.uint64), np.arange(8, dtype=np.uint64) << np.uint64(61)])
    used = words >> np.uint64(9) << np.uint64(9)  # the low bits are not used
    angles = used.astype(np.longdouble) / 2**63 * (4 * np.arctan(np.longdouble(1)))
    for found, exact in zip(global_normal._cos_sin(words), (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(found, exact.astype(np.float64), rtol=3e-15, atol=1e-18)
