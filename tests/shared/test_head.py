"""Blocks of columns, options, and the oracle of the head against finite differences and plain loops."""

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from shared import VocabPartition
from shared.head import BLOCK_COLUMNS, ColumnBlocks, LossOptions, check_softcap, merge_adjacent, tree_size
from shared.proof import head_oracle


@pytest.mark.parametrize("size", [1, 7, 48, 1000, 4096, 32000, 50257, 50304, 128256, 131072, 151936])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_blocks_cover_the_columns_in_order_and_are_narrow(size, world_size):
    partition = VocabPartition(size, world_size, "even")
    blocks = ColumnBlocks.of(partition)
    for rank in range(world_size):
        owned = np.diff(partition.owned_range(rank))[0]
        ranges = list(itertools.chain(*blocks.ranges(owned)))
        assert len(ranges) == blocks.groups * blocks.pieces
        assert np.array_equal(np.concatenate([np.arange(*each) for each in ranges]), np.arange(owned))
        assert max(stop - start for start, stop in ranges) <= min(blocks.columns, BLOCK_COLUMNS)
    assert tree_size(blocks.groups) == blocks.groups


@pytest.mark.parametrize("size", [48, 1000, 4096, 32000, 50304, 128256, 131072, 151936])
def test_blocks_and_merge_order_are_the_same_for_any_ranks(size):
    """Every rank merges the ranges of its blocks, then the ranks' are merged: the same tree, written as a text."""

    def merge(left, right):
        return ["(" + left[0] + right[0] + ")"]

    def tree(entries):
        places = np.full(tree_size(len(entries)), "", object)
        places[: len(entries)] = entries
        return merge_adjacent([places], merge)[0]

    def of_world(world_size):
        partition = VocabPartition(size, world_size)
        blocks = ColumnBlocks.of(partition).ranges(partition.rows_per_rank)
        starts = [partition.start(rank) for rank in range(world_size)]
        return tree([tree([tree([f"[{a + s},{b + s}]" for a, b in group]) for group in blocks]) for s in starts])

    assert of_world(1) == of_world(2) == of_world(4) == of_world(8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index must be in \[-2\*\*63, 2\*\*63\), got"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
        ({"z_loss": -1}, ValueError, "z_loss must be finite and not negative"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be finite"),
        ({"softcap": 0}, ValueError, "softcap must be finite and above 0, or None"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean' or 'sum' or 'none', got 'avg'"),
        ({"invalid_targets": "zero"}, ValueError, "invalid_targets must be 'error' or 'ignore'"),
        ({"returns": "lse"}, TypeError, r"such as \('lse',\), got 'lse'"),
        ({"returns": 5}, TypeError, "returns must be a sequence of names, .* got 5"),
        ({"returns": ("z",)}, ValueError, "returns must be 'lse' or 'logprobs' or 'count', got 'z'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"seq_dim": "s"}, TypeError, "seq_dim must be an integer"),
    ],
)
def test_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LossOptions(**options)
    assert check_softcap(None) is None


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_the_oracle_are_those_of_finite_differences(rng, softcap, reduction):
    hidden, weight = rng.standard_normal((3, 2, 4)), rng.standard_normal((9, 4))
    targets = np.array([[0, 6], [-100, 3], [7, 5]])  # 7 and 8 are padding
    options = LossOptions(label_smoothing=0.1, z_loss=0.03, softcap=softcap, reduction=reduction)
    upstream = {name: rng.standard_normal((3, 2)) for name in ("grad_loss", "grad_lse", "grad_logprobs")}
    if reduction != "none":
        upstream["grad_loss"] = 0.7

    def scalar(hidden, weight):
        found = head_oracle.loss(hidden, weight, targets, 7, options)
        outputs = {"grad_loss": found.loss, "grad_lse": found.lse, "grad_logprobs": found.logprobs}
        return sum((upstream[name] * value).sum() for name, value in outputs.items())

    found = head_oracle.loss(hidden, weight, targets, 7, options, **upstream)
    for array, gradient in ((hidden, found.hidden_grad), (weight, found.weight_grad)):
        for position in np.ndindex(array.shape):
            kept, values = array[position], []
            for array[position] in (kept + 1e-5, kept - 1e-5):
                values.append(scalar(hidden, weight))
            array[position] = kept
            assert gradient[position] == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_the_oracle_is_scipy_and_the_documented_formula(rng):
    hidden, weight, targets = rng.standard_normal((5, 4)), rng.standard_normal((8, 4)), np.array([0, 3, -1, 5, 8])
    x = (hidden @ weight.T)[:, :6]
    found = head_oracle.loss(hidden, weight, targets, 6)
    logprobs = log_softmax(x, axis=1)[[0, 1, 3], [0, 3, 5]]
    np.testing.assert_allclose(found.lse, logsumexp(x, axis=1))
    np.testing.assert_allclose(found.logprobs, [*logprobs[:2], 0, logprobs[2], 0])
    assert found.loss == pytest.approx(-logprobs.mean())
    assert found.count == 3
    nothing = head_oracle.loss(hidden, weight, np.full(5, -100), 6)
    assert (nothing.loss, nothing.count) == (0, 0)
    assert not nothing.hidden_grad.any()


def test_decoding_by_loops(rng):
    x = rng.integers(-2, 3, (50, 12)).astype(np.float64)
    x[0, 3], x[1], x[2, 4], x[3, 11] = np.nan, -np.inf, np.inf, np.nan
    values, ids = head_oracle.top_k(x, 10, vocab_size=11)
    uniform = rng.random(50)
    drawn = head_oracle.sample(x, uniform, 11)
    for t, row in enumerate(x[:, :11]):
        order = sorted(range(11), key=lambda j: (not np.isnan(row[j]), -np.nan_to_num(row[j]), j))
        assert ids[t].tolist() == order[:10]
        np.testing.assert_array_equal(values[t], row[order[:10]])
        if t < 3:
            assert drawn[t] == -1
        else:
            weights = np.exp(row)
            assert weights[: drawn[t]].sum() <= uniform[t] * weights.sum() < weights[: drawn[t] + 1].sum()
    assert np.array_equal(head_oracle.argmax(x, 11), ids[:, 0])
