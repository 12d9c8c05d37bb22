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
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.02, "ignore_index": 4, "invalid_targets": "ignore"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5},
]


def case(dtype, world_size, padded=24, options=None):
    """Partition, arguments and options; padding rows and hidden states of ignored tokens hold what must not spread."""
    rng, known = np.random.default_rng(0), LossOptions(**(options or {}))
    hidden, weight = (rng.standard_normal((*shape, E)).astype(DTYPES[dtype]) for shape in (TOKENS, (padded,)))
    weight[V:], hidden[0, :2] = np.nan, ([np.nan], [np.inf])
    targets = rng.integers(0, V, TOKENS)
    targets[0, :3], targets[1, :2], targets[2, 5] = -100, (0, V - 1), 4
    if known.invalid_targets == "ignore":
        targets[1, 4:7] = V, 23, 2**40
    return VocabPartition(V, world_size, padded), {"hidden": hidden, "weight": weight, "targets": targets}, known


def upstream(reduction, seed=1):
    """Gradients of a result; zero where hidden states are not finite, but for the loss, which ignores these tokens."""
    grad = np.random.default_rng(seed).standard_normal(TOKENS) if reduction == "none" else np.array(0.7)
    if seed > 1:
        grad[0, :2] = 0
    return grad


def assert_is_the_oracles(results, gradients, expected, dtype):
    """Within the bounds of the dtype, and exactly zero where the oracle's values are."""
    dtype = DTYPES[dtype]
    wide = 1e-12 if dtype == np.float64 else 2e-6  # sums of some tens of products
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 if dtype.itemsize == 2 else 0  # once, to the dtype of the inputs
    pairs = [(*pair, wide) for pair in zip(results, (expected.loss, expected.lse, expected.logprobs), strict=False)]
    assert {found.dtype for found, *_ in pairs} == {np.dtype(np.float64 if dtype == np.float64 else np.float32)}
    for name, reference in (("hidden", expected.hidden_grad), ("weight", expected.weight_grad)):
        assert np.isfinite(reference).all()
        assert gradients[name].dtype == dtype
        pairs.append((gradients[name].astype(np.float64), reference, rounding))
    for found, reference, rtol in pairs:
        np.testing.assert_allclose(found, reference, rtol=rtol, atol=20 * wide)
        assert not found[reference == 0].any()


@pytest.mark.parametrize(
    ("options", "dtype", "world_size", "seq_dim", "padded"),
    [
        (OPTIONS[0], "bfloat16", 1, None, 24),
        (OPTIONS[1], "float32", 4, 1, 28),
        (OPTIONS[1], "bfloat16", 4, 1, 24),
        (OPTIONS[2], "bfloat16", 3, None, 24),
        (OPTIONS[3], "float64", 4, None, 24),
        slower(OPTIONS[0], "float16", 4, None, 24),
        slower(OPTIONS[1], "float64", 1, 1, 28),
        slower(OPTIONS[2], "float32", 4, None, 24),
        slower(OPTIONS[3], "bfloat16", 8, 1, 24),
    ],
)
def test_loss_and_gradients(head, options, dtype, world_size, seq_dim, padded):
    partition, arrays, known = case(dtype, world_size, padded, options)
    grads = [upstream(known.reduction), upstream("none", 2), upstream("none", 3)]
    expected = head_oracle.loss(*arrays.values(), V, known, *grads)
    options = {"seq_dim": seq_dim, "returns": ("lse", "logprobs", "count"), **options}
    (*results, count), gradients = head("linear_cross_entropy", partition, arrays, grads, **options)
    assert_is_the_oracles(results, gradients, expected, dtype)
    assert (count.dtype, count) == (head.integers, expected.count)


@pytest.mark.parametrize(
    ("options", "dtype", "world_size"),
    [(OPTIONS[2], "bfloat16", 1), (OPTIONS[3], "float32", 4), slower(OPTIONS[1], "float64", 4)],
)
def test_loss_of_logits_and_their_gradients(head, options, dtype, world_size):
    partition, arrays, known = case(dtype, world_size, options=options)
    grad = upstream(known.reduction)
    expected = head_oracle.loss(*arrays.values(), V, known, grad)
    hidden, weight, targets = arrays.values()
    with np.errstate(invalid="ignore"):
        logits = head_oracle.logits(hidden, weight, V, known.softcap).astype(
            np.promote_types(DTYPES[dtype], np.float32)
        )
    others = {name: value for name, value in options.items() if name != "softcap"}
    given = {"logits": np.where(np.arange(24) < V, logits, logits.dtype.type(np.nan)), "targets": targets}
    losses, of_logits = head("parallel_cross_entropy", partition, given, [grad], **others)
    given, grads = {"hidden": hidden, "weight": weight}, list(of_logits.values())
    found, gradients = head("parallel_logits", partition, given, grads, softcap=known.softcap)
    np.testing.assert_allclose(found[0], logits, rtol=2e-6, atol=2e-6)
    gradients["hidden"] = gradients["hidden"].astype(DTYPES[dtype])  # in PyTorch the sum of the ranks' parts
    assert_is_the_oracles(losses, gradients, expected, dtype)
    assert not grads[0][0, :3].any()
    assert not grads[0][..., V:].any()


def test_all_ignored_gives_zero_and_no_gradient(head):
    """Whatever the table holds: there is no row that these tokens may reach."""
    partition, arrays, _ = case("float32", 4)
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
    """-inf cannot occur. What has no distribution gives NaN, but no gradient unless one comes from upstream.

    The first token's exponentials are all zero in float32.
    """
    logits = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float16)
    logits[0] -= 200
    logits[0, 5] = logits[1, 3] = logits[2] = -np.inf
    logits[3, 20], logits[4, 20], logits[5], logits[:, V:] = np.nan, np.inf, np.nan, np.nan
    partition, arrays = VocabPartition(V, 3, 24), {"logits": logits, "targets": np.array([3, 3, 3, 3, 3, -100])}
    grads = [np.array([1.0, 1, 0, 0, 0, 1])]
    (loss,), gradients = head("parallel_cross_entropy", partition, arrays, grads, reduction="none")
    (grad,), x = gradients.values(), logits[0, :V].astype(np.float64)
    lse = head_oracle.logsumexp(x)
    np.testing.assert_allclose(loss, [lse - x[3], np.inf, np.nan, np.nan, np.nan, 0], rtol=1e-5)
    np.testing.assert_allclose(grad[0, :V], np.exp(x - lse) - (np.arange(V) == 3), rtol=2.0**-11, atol=1e-7)
    assert (loss.dtype, grad.dtype) == (np.float32, np.float16)
    assert not grad[2:].any()
    assert not grad[:, V:].any()
    one_token = {name: array[:1] for name, array in arrays.items()}
    assert head("parallel_cross_entropy", partition, one_token, label_smoothing=0.1)[0] == [np.inf]


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint64", slower("uint8"), slower("uint32"), slower("int32")])
def test_targets_of_any_integer_dtype(head, dtype):
    """One that is large is invalid, also where it would wrap to the ignored one."""
    (partition, arrays, _), large = case("float32", 1), np.iinfo(dtype).max - 99
    hidden, weight, targets = arrays.values()
    given = {"hidden": hidden[1:], "weight": weight, "targets": targets[1:].astype(dtype)}
    (loss,), _ = head("linear_cross_entropy", partition, given)
    np.testing.assert_allclose(loss, head_oracle.loss(*given.values(), V).loss, rtol=2e-6)
    given["targets"][0, 0] = large
    with pytest.raises(IndexError, match=rf"targets\[0, 0\] = {large} is outside"):
        head("linear_cross_entropy", partition, given)


SHAPES = {"hidden": (4, 4, E), "weight": (24, E), "logits": (4, 4, 24), "targets": (4, 4), "uniform": (4, 4)}
ARGUMENTS = {
    "linear_cross_entropy": ("hidden", "weight", "targets"),
    "parallel_cross_entropy": ("logits", "targets"),
    "parallel_logits": ("hidden", "weight"),
    "parallel_sample": ("logits", "uniform"),
}


def zeros_for(name, changed):
    """Arguments of a function; ``changed`` holds other shapes, or dtypes."""
    for argument in ARGUMENTS.get(name, ["logits"]):
        shape, dtype = SHAPES[argument], "int64" if argument == "targets" else "float32"
        change = changed.get(argument, shape)
        yield argument, np.zeros(shape, change) if isinstance(change, str) else np.zeros(change, dtype)


@pytest.mark.parametrize("bad", [V, 23, -1, 2**40])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "parallel_cross_entropy"])
def test_invalid_targets_are_named(head, name, bad):
    """Of the padding or of no row: on every rank."""
    arrays = dict(zeros_for(name, {}))
    arrays["targets"][1, 3] = bad
    with pytest.raises(IndexError, match=rf"targets\[1, 3\] = {bad} is outside the vocabulary \[0, 21\)"):
        head(name, VocabPartition(V, 4, 24), arrays)


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("parallel_cross_entropy", {"logits": (4, 4, 96)}, ValueError, "own 6 columns, got 24"),
        ("parallel_argmax", {"logits": (4, 96)}, ValueError, "own 6 columns, got 24"),
        ("parallel_logits", {"weight": (96, E)}, ValueError, r"rank's own rows, \[6, emb_size\]"),
        ("parallel_logits", {"hidden": (4, 4, 7)}, ValueError, "emb_size=8 as weight has"),
        ("linear_cross_entropy", {"targets": (4,)}, ValueError, "targets must be one a token, of shape"),
        ("linear_cross_entropy", {"seq_dim": -3}, ValueError, "seq_dim must name"),
        (
            "linear_cross_entropy",
            {"returns": "lse"},
            TypeError,
            "returns must be a sequence of names, such as .*, got 'lse'",
        ),
        ("parallel_sample", {"uniform": (4,)}, ValueError, "uniform must be one a token"),
        ("parallel_top_k", {"k": 22}, ValueError, r"k must be in \[1, vocab_size\] = \[1, 21\], got 22"),
        ("parallel_top_k", {"k": 1.0}, TypeError, "k must be an integer"),
        ("parallel_logits", {"hidden": "float16"}, TypeError, "hidden must be of the weight's dtype"),
        ("parallel_logits", {"hidden": "int32", "weight": "int32"}, TypeError, "must be float16, .* got .*int32"),
        ("linear_cross_entropy", {"targets": "float32"}, TypeError, "targets must be .* integer dtype, got dtype"),
        ("parallel_cross_entropy", {"logits": "int32"}, TypeError, "logits must be float16, .* got .*int32"),
        ("parallel_argmax", {"logits": "int32"}, TypeError, "logits must be float16, .* got .*int32"),
        ("parallel_sample", {"uniform": "int32"}, TypeError, "uniform must be float16, .* got .*int32"),
    ],
)
def test_what_is_refused(head, name, changed, error, message):
    arrays = dict(zeros_for(name, changed))
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


DECODED = [("float32", 4, 28), ("bfloat16", 1, 24), slower("float16", 4, 24), slower("bfloat16", 8, 24)]


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


@pytest.mark.parametrize(("dtype", "world_size", "padded"), [*DECODED, slower("float64", 4, 28)])
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
    assert all(bits(world_size) == alone for world_size in (2, 8))
