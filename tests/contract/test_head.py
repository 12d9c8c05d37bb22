"""Logits, cross entropy and decoding over a split vocabulary, against the float64 oracle."""

import ml_dtypes
import numpy as np
import pytest
from contract.backends import DTYPES
from marks import slower

from shared import VocabPartition
from shared.head import LossOptions
from shared.proof import head_oracle

V, E, TOKENS = 21, 8, (3, 8)  # padded to 24, of 4 ranks the last has 3 ids; padded to 28 it has none
IGNORED = np.s_[0, :3]  # tokens with a target of -100
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.02, "ignore_index": 4, "invalid_targets": "ignore"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5},
]


def case(dtype, world_size, padded=24):
    """Partition and arguments; padding rows and the hidden states of two ignored tokens hold what must not spread."""
    rng = np.random.default_rng(0)
    hidden, weight = (rng.standard_normal((*shape, E)).astype(DTYPES[dtype]) for shape in (TOKENS, (padded,)))
    weight[V:], hidden[0, :2] = np.nan, ([np.nan], [np.inf])
    targets = rng.integers(0, V, TOKENS)
    targets[IGNORED], targets[1, :2], targets[2, 5] = -100, (0, V - 1), 4
    return VocabPartition(V, world_size, padded), {"hidden": hidden, "weight": weight, "targets": targets}


def upstream(reduction, seed=1):
    """Gradients of a result; zero where hidden states are not finite, but for the loss, which ignores these tokens."""
    grad = np.random.default_rng(seed).standard_normal(TOKENS) if reduction == "none" else np.array(0.7)
    if seed > 1:
        grad[0, :2] = 0
    return grad


def assert_is_the_oracles(results, gradients, expected, dtype, exact_zeros, atol=0.0):
    """Results and gradients are within the bounds of the dtype, and zero where that is promised."""
    dtype = DTYPES[dtype]
    wide = 1e-12 if dtype == np.float64 else 2e-6  # sums of some tens of products
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 if dtype.itemsize == 2 else 0  # once, to the dtype of the inputs
    for found, reference in zip(results, (expected.loss, expected.lse, expected.logprobs), strict=False):
        np.testing.assert_allclose(found, reference, rtol=wide, atol=10 * wide)
        assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    for name, reference in (("hidden", expected.hidden_grad), ("weight", expected.weight_grad)):
        assert np.isfinite(reference).all()
        found = gradients[name].astype(np.float64)
        np.testing.assert_allclose(found, reference, rtol=rounding, atol=20 * wide + atol * rounding, err_msg=name)
    assert not gradients["weight"][V:].any()
    assert not gradients["hidden"][exact_zeros].any()


@pytest.mark.parametrize(
    ("option", "dtype", "world_size", "seq_dim", "padded"),
    [
        (0, "bfloat16", 1, None, 24),
        (1, "float32", 4, 1, 28),
        (2, "bfloat16", 4, 1, 24),
        (3, "float64", 4, None, 24),
        slower(0, "float16", 4, None, 24),
        slower(1, "float64", 1, 1, 28),
        slower(2, "float32", 4, None, 24),
        slower(3, "bfloat16", 8, 1, 24),
    ],
)
def test_loss_and_gradients(head, option, dtype, world_size, seq_dim, padded):
    partition, arrays = case(dtype, world_size, padded)
    options = LossOptions(**OPTIONS[option])
    if options.invalid_targets == "ignore":
        arrays["targets"][1, 4:7] = V, 23, 2**40
    grads = [upstream(options.reduction), upstream("none", 2), upstream("none", 3)]
    expected = head_oracle.loss(*arrays.values(), V, options, *grads)
    results, gradients = head(
        "linear_cross_entropy",
        partition,
        arrays,
        grads,
        seq_dim=seq_dim,
        returns=("lse", "logprobs", "count"),
        **OPTIONS[option],
    )
    assert_is_the_oracles(results, gradients, expected, dtype, np.s_[0, :2])
    assert (results[3].dtype, results[3]) == (head.integers, expected.count)
    assert {grad.dtype for grad in gradients.values()} == {DTYPES[dtype]}
    for per_token in (results[2], *[results[0]] * (options.reduction == "none")):
        assert not per_token[IGNORED].any()


@pytest.mark.parametrize(
    ("option", "dtype", "world_size"), [(2, "bfloat16", 1), (3, "float32", 4), slower(1, "bfloat16", 4)]
)
def test_loss_of_logits_and_their_gradients(head, option, dtype, world_size):
    options = dict(OPTIONS[option])
    softcap, (partition, arrays) = options.pop("softcap", None), case(dtype, world_size)
    hidden, weight, targets = arrays.values()
    known = LossOptions(**OPTIONS[option])
    grad = upstream(known.reduction)
    expected = head_oracle.loss(*arrays.values(), V, known, grad)
    with np.errstate(invalid="ignore"):
        logits = head_oracle.logits(hidden, weight, V, softcap).astype(np.float32)
    arrays = {"logits": logits.copy(), "targets": targets}
    arrays["logits"][..., V:] = np.nan
    losses, of_logits = head("parallel_cross_entropy", partition, arrays, [grad], **options)
    assert not of_logits["logits"][IGNORED].any()
    assert not of_logits["logits"][..., V:].any()
    arrays = {"hidden": hidden, "weight": weight}
    found, gradients = head("parallel_logits", partition, arrays, [of_logits["logits"]], softcap=softcap)
    np.testing.assert_allclose(found[0], logits, rtol=2e-6, atol=2e-6)
    # In PyTorch each rank's part of hidden's gradient is rounded.
    assert_is_the_oracles(losses, gradients, expected, dtype, IGNORED, atol=4)


def test_all_ignored_gives_zero_and_no_gradient(head):
    """Whatever the table holds: there is no row that these tokens may reach."""
    partition, arrays = case("float32", 4)
    arrays["weight"][5], arrays["targets"][:] = np.nan, -100
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "returns": ("count",)}
    (loss, count), gradients = head("linear_cross_entropy", partition, arrays, [np.array(1.0)], **options)
    assert (loss, count) == (0, 0)
    assert not any(grad.any() for grad in gradients.values())


@pytest.mark.parametrize(("shape", "seq_dim"), [((0,), None), ((3, 0), 1)])
def test_an_empty_batch(head, shape, seq_dim):
    arrays = {"hidden": np.ones((*shape, E)), "weight": np.ones((8, E)), "targets": np.empty(shape, np.int64)}
    (loss,), gradients = head("linear_cross_entropy", VocabPartition(5, 4, 8), arrays, [np.array(1.0)], seq_dim=seq_dim)
    assert (loss, gradients["hidden"].shape) == (0, (*shape, E))
    assert not gradients["weight"].any()


def test_special_logits(head):
    """-inf cannot occur. What has no distribution gives NaN, but no gradient unless one comes from upstream."""
    logits = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float16)
    logits[0, 5], logits[1, 3], logits[2], logits[3, 20], logits[4, 20], logits[5] = (
        *[-np.inf] * 3,
        np.nan,
        np.inf,
        np.nan,
    )
    logits[:, V:], targets = np.nan, np.array([3, 3, 3, 3, 3, -100])
    arrays, grad = {"logits": logits, "targets": targets}, np.array([1.0, 1, 0, 0, 0, 1])
    partition = VocabPartition(V, 4, 24)
    (loss,), gradients = head("parallel_cross_entropy", partition, arrays, [grad], reduction="none")
    possible = np.delete(logits[0, :V], 5).astype(np.float64)
    np.testing.assert_allclose(
        loss, [head_oracle.logsumexp(possible) - possible[3], np.inf, *[np.nan] * 3, 0], rtol=2e-6
    )
    softmax = np.exp(logits[0, :V].astype(np.float64)) / np.exp(possible).sum() - (np.arange(V) == 3)
    np.testing.assert_allclose(gradients["logits"][0, :V], softmax, rtol=2.0**-11, atol=1e-7)
    assert (loss.dtype, gradients["logits"].dtype) == (np.float32, np.float16)
    assert not gradients["logits"][2:].any()
    assert not gradients["logits"][:, V:].any()
    arrays = {"logits": logits[:1], "targets": targets[:1]}
    assert head("parallel_cross_entropy", partition, arrays, label_smoothing=0.1)[0] == [np.inf]


@pytest.mark.parametrize("bad", [V, 23, -1, 2**40])
def test_invalid_targets_are_named(head, bad):
    """Of the padding or of no row: on every rank."""
    partition, arrays = case("float32", 4)
    arrays["targets"][1, 4] = bad
    for name in ("linear_cross_entropy", "parallel_cross_entropy"):
        if name == "parallel_cross_entropy":
            arrays = {"logits": np.ones((*TOKENS, 24), np.float32), "targets": arrays["targets"]}
        with pytest.raises(IndexError, match=rf"targets\[1, 4\] = {bad} is outside the vocabulary \[0, 21\)"):
            head(name, partition, arrays)


@pytest.mark.parametrize("dtype", ["int8", "uint16", slower("uint8"), slower("uint32"), slower("int32")])
def test_targets_of_any_integer_dtype(head, dtype):
    """An unsigned target that would wrap to the ignored one is invalid."""
    (partition, arrays), limits = case("float32", 1), np.iinfo(dtype)
    arrays["targets"] = (arrays["targets"] if limits.min else abs(arrays["targets"]) % V).astype(dtype)
    arrays["hidden"][0, :2] = 1
    (loss,), _ = head("linear_cross_entropy", partition, arrays)
    np.testing.assert_allclose(loss, head_oracle.loss(*arrays.values(), V).loss, rtol=2e-6)
    if limits.min == 0:
        arrays["targets"][0, 0] = limits.max - 99
        with pytest.raises(IndexError, match=rf"targets\[0, 0\] = {limits.max - 99} is outside"):
            head("linear_cross_entropy", partition, arrays)


SHAPES = {"hidden": (4, 4, E), "weight": (24, E), "logits": (4, 4, 24), "targets": (4, 4), "uniform": (4, 4)}
ARGUMENTS = {
    "linear_cross_entropy": ("hidden", "weight", "targets"),
    "parallel_cross_entropy": ("logits", "targets"),
    "parallel_logits": ("hidden", "weight"),
    "parallel_sample": ("logits", "uniform"),
}


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("parallel_cross_entropy", {"logits": (4, 4, 96)}, ValueError, "own 6 columns, got 24"),
        ("parallel_argmax", {"logits": (4, 96)}, ValueError, "own 6 columns, got 24"),
        ("parallel_logits", {"weight": (96, E)}, ValueError, r"rank's own rows, \[6, emb_size\]"),
        ("parallel_logits", {"hidden": (4, 4, 7)}, ValueError, "emb_size=8 as weight has"),
        ("linear_cross_entropy", {"targets": (4,)}, ValueError, "targets must be one a token, of shape"),
        ("parallel_sample", {"uniform": (4,)}, ValueError, "uniform must be one a token"),
        ("parallel_logits", {"hidden": "float16"}, TypeError, "hidden must be of the weight's dtype"),
        ("parallel_logits", {"hidden": "int32", "weight": "int32"}, TypeError, "must be float16, .* got .*int32"),
        ("linear_cross_entropy", {"targets": "float32"}, TypeError, "targets must be .* integer dtype, got dtype"),
        ("parallel_cross_entropy", {"logits": "int32"}, TypeError, "logits must be float16, .* got .*int32"),
        ("parallel_argmax", {"logits": "int32"}, TypeError, "logits must be float16, .* got .*int32"),
        ("parallel_sample", {"uniform": "int32"}, TypeError, "uniform must be float16, .* got .*int32"),
        ("linear_cross_entropy", {"seq_dim": -3}, ValueError, "seq_dim must name"),
        ("parallel_top_k", {"k": 22}, ValueError, r"k must be in \[1, vocab_size\] = \[1, 21\], got 22"),
        ("parallel_top_k", {"k": 1.0}, TypeError, "k must be an integer"),
    ],
)
def test_what_is_refused(head, name, changed, error, message):
    """On every rank. A case changes shapes or dtypes of arguments, or options."""
    arrays = {}
    for argument in ARGUMENTS.get(name, ["logits"]):
        shape, dtype = SHAPES[argument], "int64" if argument == "targets" else "float32"
        change = changed.get(argument, shape)
        arrays[argument] = np.zeros(shape, change) if isinstance(change, str) else np.zeros(change, dtype)
    options = {option: value for option, value in changed.items() if option not in arrays}
    with pytest.raises(error, match=message):
        head(name, VocabPartition(V, 4, 24), arrays, **options)


def logits_of(dtype, padded):
    """Few distinct values, so that ties are many; special ones; padding that would win if it were looked at."""
    x = np.random.default_rng(0).integers(-3, 4, (40, padded)) / 2
    x[0, 3], x[1], x[2, 4], x[3, 20], x[4, 6:] = np.nan, -np.inf, np.inf, np.nan, -np.inf
    x[5, :V], x[6, 2], x[7, [9, 11]] = 0.0, -np.nan, (np.inf, np.nan)
    x[5, ::2] = -0.0
    x[8, :V], x[8, 17] = -1e4, 80  # exponentials below the maximum vanish
    x[:, V:] = np.resize([np.inf, np.nan, 1e30 if dtype != "float16" else 1e4], padded - V)
    return x.astype(DTYPES[dtype]).reshape(4, 10, padded)


DECODED = [
    ("float32", 4, 28),
    ("bfloat16", 1, 24),
    slower("float16", 4, 24),
    slower("bfloat16", 8, 24),
]


@pytest.mark.parametrize(("dtype", "world_size", "padded"), DECODED)
def test_top_k_and_argmax(head, dtype, world_size, padded):
    logits, partition = logits_of(dtype, padded), VocabPartition(V, world_size, padded)
    for k in (4, V):
        (values, ids), _ = head("parallel_top_k", partition, {"logits": logits}, k=k)
        expected_values, expected_ids = head_oracle.top_k(logits, k, V)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(*(each.astype(float) for each in (values, expected_values)))
        assert (values.dtype, ids.dtype) == (DTYPES[dtype], head.integers)
    for given in (logits, logits[:0]):
        (ids,), _ = head("parallel_argmax", partition, {"logits": given})
        np.testing.assert_array_equal(ids, head_oracle.argmax(given, V))
        assert ids.dtype == head.integers


@pytest.mark.parametrize(("dtype", "world_size", "padded"), DECODED)
def test_sampling(head, dtype, world_size, padded):
    logits, partition = np.stack([logits_of(dtype, padded)] * 3), VocabPartition(V, world_size, padded)
    uniform = np.random.default_rng(1).random((3, 4, 10), np.float32)
    uniform[1:] = np.array([0, 1 - 2.0**-24]).reshape(2, 1, 1)
    (ids,), _ = head("parallel_sample", partition, {"logits": logits, "uniform": uniform})
    np.testing.assert_array_equal(ids, head_oracle.sample(logits, uniform, V))
    assert (ids[:, 0, [0, 1, 2, 3, 6, 7]] == -1).all()  # what has no distribution
    assert ids.dtype == head.integers


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("bfloat16", (5003, 16, 1100)),  # over 8 ranks one block each; two chunks of tokens
        slower("float32", (8, 5, 7)),
        slower("float32", (6288, 64, 1100)),
        slower("float32", (32000, 32, 40)),
    ],
)
def test_bits_do_not_depend_on_the_number_of_ranks(head, dtype, sizes):
    """Loss, lse, logits and the table's gradient, for a vocabulary, a width and a number of tokens."""
    rng, (vocab_size, width, tokens) = np.random.default_rng(0), sizes
    hidden, weight = (rng.standard_normal((n, width)).astype(DTYPES[dtype]) for n in (tokens, -(-vocab_size // 8) * 8))
    targets, options = rng.integers(0, vocab_size, tokens), {"softcap": 1.5, "label_smoothing": 0.1, "z_loss": 0.01}

    def bits(world_size):
        partition = VocabPartition(vocab_size, world_size, len(weight))
        arrays = {"hidden": hidden, "weight": weight, "targets": targets}
        results, grads = head("linear_cross_entropy", partition, arrays, [np.array(1.0)], returns=("lse",), **options)
        logits, _ = head("parallel_logits", partition, {"hidden": hidden, "weight": weight})
        return [each.tobytes() for each in (*results, *logits, grads["weight"])]

    alone = bits(1)
    assert all(bits(world_size) == alone for world_size in (2, 4, 8))
