"""Logits, cross entropy and decoding over a split vocabulary, against the float64 oracle."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import make_mesh

from jax_impl import (
    linear_cross_entropy,
    parallel_argmax,
    parallel_cross_entropy,
    parallel_logits,
    parallel_sample,
    parallel_top_k,
)
from shared import VocabPartition
from shared.head import LossOptions
from shared.proof import head_oracle

V, E, TOKENS = 21, 8, (3, 8)  # padded to 24: of 4 ranks the last has 3 ids, of 8 the last has none
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.02, "ignore_index": 4, "invalid_targets": "ignore"},
    {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 1.5},
]
# Sums of a few tens of products: some units in the last place of the dtype that hidden states and table have.
TOLERANCE = {np.float32: 2e-5, ml_dtypes.bfloat16: 2e-2}


def case(dtype, world_size):
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, 24)
    hidden = rng.standard_normal((*TOKENS, E)).astype(dtype)
    weight = rng.standard_normal((24, E)).astype(dtype)
    weight[V:] = np.nan  # padding rows take no part, whatever they hold
    targets = rng.integers(0, V, TOKENS).astype(np.int32)
    targets[0, :3], targets[2, 5], targets[1, :2] = -100, 4, (0, V - 1)
    return hidden, weight, targets, partition


def mapped(function, world_size, in_specs, out_specs):
    mesh = make_mesh((world_size,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def check_loss(loss, specs, dtype, world_size, options):
    """The mapped loss and its gradients are the oracle's."""
    hidden, weight, targets, _ = case(dtype, world_size)
    known = LossOptions(**options)
    upstream = np.random.default_rng(1).standard_normal(TOKENS) if known.reduction == "none" else np.array(0.7)
    expected = head_oracle.loss(hidden, weight, targets, V, known, upstream)

    def step(hidden, weight, upstream):
        found, pull_back = jax.vjp(lambda hidden, weight: loss(hidden, weight, targets), hidden, weight)
        return found, *pull_back(upstream.astype(found.dtype))

    run = mapped(step, world_size, (specs, P("tp"), P()), (P(), specs, P("tp")))
    found, hidden_grad, weight_grad = map(np.asarray, run(hidden, weight, jnp.asarray(upstream)))
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    np.testing.assert_allclose(found, expected.loss, **close)
    np.testing.assert_allclose(hidden_grad.astype(np.float64), expected.hidden_grad, **close)
    np.testing.assert_allclose(weight_grad[:V].astype(np.float64), expected.weight_grad[:V], **close)
    assert not weight_grad[V:].any()


@pytest.mark.parametrize(
    ("option", "dtype", "world_size", "seq_dim"),
    [
        (0, ml_dtypes.bfloat16, 1, None),
        (1, np.float32, 4, None),
        (2, ml_dtypes.bfloat16, 4, 1),
        (3, np.float32, 4, None),
        slower(0, ml_dtypes.bfloat16, 4, None),
        slower(3, np.float32, 4, 1),
    ],
)
def test_loss_and_gradients(option, dtype, world_size, seq_dim):
    def loss(hidden, weight, targets):
        partition = VocabPartition(V, world_size, 24)
        return linear_cross_entropy(hidden, weight, targets, partition, "tp", seq_dim=seq_dim, **OPTIONS[option])

    check_loss(loss, P() if seq_dim is None else P(None, "tp"), dtype, world_size, OPTIONS[option])


@pytest.mark.parametrize("option", [3, slower(2)])
def test_loss_of_logits_that_are_there(option):
    options, partition = dict(OPTIONS[option]), VocabPartition(V, 4, 24)
    softcap = options.pop("softcap", None)

    def loss(hidden, weight, targets):
        logits = parallel_logits(hidden, weight, partition, "tp", softcap=softcap)
        return parallel_cross_entropy(logits, targets, partition, "tp", **options)

    check_loss(loss, P(), np.float32, 4, OPTIONS[option])


@pytest.mark.parametrize("world_size", [4, slower(8)])
def test_decoding(world_size):
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, 24)
    logits = rng.integers(-2, 3, (6, 24)).astype(np.float32)  # many ties
    logits[0, 5], logits[1, 2], logits[2] = np.nan, np.inf, -np.inf
    values, ids = head_oracle.top_k(logits[:, :V], 7, V)

    def decode(logits):
        return parallel_argmax(logits, partition, "tp"), *parallel_top_k(logits, 7, partition, "tp")

    found = mapped(decode, world_size, P(None, "tp"), P())(logits)
    np.testing.assert_array_equal(found[0], head_oracle.argmax(logits[:, :V], V))
    np.testing.assert_array_equal(found[1], values.astype(np.float32))
    np.testing.assert_array_equal(found[2], ids)


def test_logits_that_do_not_fit_are_refused():
    partition = VocabPartition(V, 4, 24)
    with pytest.raises(ValueError, match="24"):
        mapped(lambda logits: parallel_argmax(logits, partition, "tp"), 4, P(), P())(jnp.zeros((2, 24)))
    for function in (
        lambda logits: parallel_argmax(logits, partition, "tp"),
        lambda logits: parallel_cross_entropy(logits, np.zeros(2, np.int32), partition, "tp"),
    ):
        with pytest.raises(TypeError, match="logits must be float16, bfloat16, float32 or float64, got int32"):
            mapped(function, 4, P(None, "tp"), P())(jnp.zeros((2, 24), int))


@pytest.mark.parametrize("world_size", [4, slower(1), slower(8)])
def test_sampling(world_size):
    rng, partition = np.random.default_rng(0), VocabPartition(V, world_size, 24)
    logits = (3 * rng.standard_normal((500, 24))).astype(np.float32)
    uniform = rng.random(500, np.float32)
    uniform[:2], logits[2:8, :12], logits[:, 14] = (0, 1 - 2**-24), -np.inf, -np.inf
    logits[8, 3], logits[9, 20], logits[10, :V] = np.nan, np.inf, -np.inf
    logits[11, :V], logits[11, 17] = -1e4, 80  # exponentials below the maximum vanish

    def draw(logits, uniform):
        return parallel_sample(logits, partition, "tp", uniform=uniform)

    found = np.asarray(mapped(draw, world_size, (P(None, "tp"), P()), P())(logits, uniform))
    np.testing.assert_array_equal(found, head_oracle.sample(logits, uniform, V))
    assert (found[8:11] == -1).all()


def test_special_logits():
    """As the oracle, whose table is the logits: hidden states are the rows of a unit matrix."""
    targets, partition = np.array([3, -100, 7], np.int32), VocabPartition(V, 4, 24)

    def step(logits):
        found, pull_back = jax.vjp(
            lambda logits: parallel_cross_entropy(logits, targets, partition, "tp", reduction="none"), logits
        )
        return found, *pull_back(jnp.ones_like(found))

    run = mapped(step, 4, P(None, "tp"), (P(), P(None, "tp")))
    special = {
        "a target that cannot occur": (np.s_[0, 3], -np.inf),
        "an id that cannot occur": (np.s_[0, 5], -np.inf),
        "nothing can occur": (0, -np.inf),
        "NaN": (np.s_[0, 20], np.nan),
        "infinity": (np.s_[0, 20], np.inf),
        "padding": (np.s_[:, V:], np.nan),
    }
    for kind, (place, value) in special.items():
        logits = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
        logits[place] = value
        with np.errstate(all="ignore"):
            x = logits[:, :V].astype(np.float64)
            top = np.where(x.max(1) == -np.inf, 0, x.max(1))
            lse = top + np.log(np.exp(x - top[:, None]).sum(1))
            expected = np.where(targets < 0, 0, lse - x[np.arange(3), targets.clip(0)])
        loss, grad = map(np.asarray, run(logits))
        np.testing.assert_allclose(loss, expected, rtol=2e-5, err_msg=kind)
        assert not grad[1].any(), kind
        assert not grad[:, V:].any(), kind
        assert np.isfinite(grad[2]).all(), kind


def test_tokens_that_are_ignored_reach_nothing():
    """All ignored: a mean of 0 and a count of 0; NaN in their hidden states stays there. No tokens at all: the same."""
    hidden, weight, targets, partition = case(np.float32, 4)
    hidden[0, 0] = np.nan

    def step(hidden, weight, targets):
        def loss(hidden, weight):
            options = {"z_loss": 0.1, "label_smoothing": 0.1, "returns": ("count",)}
            return linear_cross_entropy(hidden, weight, targets, partition, "tp", **options)

        (found, count), pull_back = jax.vjp(loss, hidden, weight)
        return found, count, *pull_back((jnp.ones_like(found), np.zeros((), jax.dtypes.float0)))

    run = mapped(step, 4, (P(), P("tp"), P()), (P(), P(), P(), P("tp")))
    loss, count, *grads = run(hidden, weight, np.full_like(targets, -100))
    assert (loss, count) == (0, 0)
    assert not any(np.asarray(grad).any() for grad in grads)
    loss, count, *grads = run(hidden, weight, targets)
    assert np.isfinite(loss)
    assert count == (targets >= 0).sum()
    assert all(np.isfinite(grad).all() for grad in grads)
    spoilt = weight.copy()
    spoilt[5] = np.nan  # a row of the vocabulary
    _, _, grad, _ = run(hidden, spoilt, targets)
    assert not np.asarray(grad)[targets < 0].any()
    loss, count, *grads = run(hidden[:, :0], weight, targets[:, :0])
    assert (loss, count) == (0, 0)
    assert not np.asarray(grads[1]).any()


@pytest.mark.parametrize("dtypes", [("int8", "uint16", "uint32"), ("int64",)], ids=str)
def test_targets_of_any_integer_dtype(dtypes):
    """An unsigned id that would wrap to the ignored one is not ignored."""
    hidden, weight, targets, partition = case(np.float32, 1)
    limits = {dtype: np.iinfo(dtype) for dtype in dtypes}
    with jax.enable_x64("int64" in dtypes):
        given = {
            dtype: jnp.asarray(abs(targets) % V, dtype).at[0, 0].set(-100 if known.min else known.max - 99)
            for dtype, known in limits.items()
        }

        def step(hidden, weight, given):
            loss = functools.partial(linear_cross_entropy, hidden, weight, returns=("count",))
            return {dtype: loss(targets, partition, "tp") for dtype, targets in given.items()}

        found = mapped(step, 1, (P(), P("tp"), P()), P())(hidden, weight, given)
    for dtype, (loss, count) in found.items():
        assert count == targets.size - 1, dtype
        assert np.isnan(loss) == (limits[dtype].min == 0), dtype


def bits_of_a_step(world_size, size, dtype, options):
    rng, partition = np.random.default_rng(0), VocabPartition(size, world_size, -(-size // 8) * 8)
    hidden, targets = rng.standard_normal((40, 32)).astype(dtype), rng.integers(0, size, 40).astype(np.int32)
    weight = (0.3 * rng.standard_normal((partition.padded_vocab_size, 32))).astype(dtype)

    def step(hidden, weight):
        def loss(weight):
            return linear_cross_entropy(hidden, weight, targets, partition, "tp", returns=("lse",), **options)

        (found, lse), pull_back = jax.vjp(loss, weight)
        return found, lse, *pull_back((jnp.ones_like(found), jnp.zeros_like(lse)))

    run = mapped(step, world_size, (P(), P("tp")), (P(), P(), P("tp")))
    return [np.asarray(each).tobytes() for each in run(hidden, weight)]


@pytest.mark.parametrize(
    ("size", "options", "dtype"),
    [(5003, OPTIONS[3] | {"reduction": "mean"}, ml_dtypes.bfloat16), slower(32000, {}, np.float32)],
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_ranks(size, options, dtype):
    """Loss, lse and the table's gradient; 5003 ids over 8 ranks are one block each, 32000 are four."""
    whole = bits_of_a_step(1, size, dtype, options)
    for world_size in (2, 4, 8):
        assert bits_of_a_step(world_size, size, dtype, options) == whole


def abstract_step(world_size, tokens, size, width, dtype, seq_dim=None):
    """The compiled forward, and the compiled loss with both gradients."""
    mesh, partition = make_mesh((world_size,)), VocabPartition(size, world_size)
    split = P() if seq_dim is None else P("tp")
    shapes = ((tokens, width), dtype, split), ((size, width), dtype, P("tp")), ((tokens,), "int32", P())
    given = [jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec)) for shape, kind, spec in shapes]

    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, partition, "tp", seq_dim=seq_dim)

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(split, P("tp"), P()), out_specs=P())
    return [jax.jit(each).lower(*given).compile() for each in (mapped, jax.value_and_grad(mapped, (0, 1)))]


def collectives(program):
    pattern = r"= \(?(\w+)\[\S* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return dict(Counter(f"{kind} {dtype}" for dtype, kind in re.findall(pattern, program.as_text())))


def test_collectives():
    forward, gradient = map(collectives, abstract_step(4, 64, 4096, 32, "bfloat16"))
    assert forward == {"all-gather f32": 1}
    assert gradient == {"all-gather f32": 1, "all-reduce f32": 1}
    forward, gradient = abstract_step(4, 64, 4096, 32, "bfloat16", seq_dim=0)
    assert sum(collectives(forward).values()) == 2  # hidden states, statistics
    found = collectives(gradient)
    assert found.pop("reduce-scatter f32") == 1
    assert sum(found.values()) == 2
    assert all(name.startswith("all-gather") for name in found)


@pytest.mark.slow
def test_logits_are_never_whole():
    """8192 tokens, 131072 ids: the logits would take 4 GiB."""
    for program in abstract_step(4, 8192, 131072, 1024, "bfloat16"):
        # In bfloat16 all of it is hidden's gradient in float32, before and after its sum over the ranks.
        assert program.memory_analysis().temp_size_in_bytes <= 64 * 2**20 + 4096
        assert not re.search(r"\[8192,(?:131072|32768)\]", program.as_text())
