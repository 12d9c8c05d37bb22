"""What the contract's tests do not ask of JAX: jit, checkify, JAX's own ids, and meshes of several axes and kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from marks import slower
from meshes import assert_same_bits, make_mesh, on

from jax_impl import ParallelVocabEmbedding, as_ids
from jax_impl.lookup import gather
from shared.proof.oracle import partial_lookup, sum_partials


def call(emb, ids):
    return emb(ids)


def oracle(emb, ids):
    table, n = np.asarray(emb.weight), emb.partition.rows_per_rank
    return np.stack([partial_lookup(table[r * n : r * n + n], ids, emb.partition, r) for r in range(emb.world_size)])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("shape", "names", "dtype"),
    [
        ((2, 2, 2), ("dp", "tp", "sp"), jnp.bfloat16),
        slower((1,), ("tp",), jnp.float16),
        slower((3,), ("tp",), jnp.float32),
        slower((8,), ("tp",), jnp.bfloat16),
    ],
)
def test_partials_are_the_oracles_and_sum_to_the_lookup(mesh_of, rng, dtype, shape, names):
    emb = ParallelVocabEmbedding(48, 6, mesh_of(shape, names), dtype=dtype)
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, 48, 60)]).reshape(4, -1)
    partials, expected = emb(ids), oracle(emb, ids)
    assert_same_bits(partials, expected)
    assert_same_bits(jax.jit(call)(emb, ids.astype(np.int32)), expected)
    np.testing.assert_array_equal(jnp.sum(partials, axis=0), sum_partials(list(expected)))


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint16, np.int64, np.uint64, *map(slower, (np.uint8, np.int16, np.int32, np.uint32))]
)
def test_no_integer_dtype_narrows_in_jit(mesh_of, dtype):
    emb = ParallelVocabEmbedding(600, 4, mesh_of((3,)))
    info = np.iinfo(dtype)
    values = [0, 5, 100, 127, *(v for v in (199, 200, 399, 400, 599, 600) if v <= info.max), info.min, info.max]
    if info.max >= 2**63:
        values += [2**63, 2**63 + 5, 2**64 - 1]
    if info.bits == 64:
        values += [2**31 + 5, 2**32, 2**32 + 5]
    ids = np.array(values, dtype)
    with jax.enable_x64(info.bits == 64):
        results = emb(ids), emb(jnp.asarray(ids)), jax.jit(call)(emb, jnp.asarray(ids))
    for result in results:
        for row, value in zip(np.asarray(result).sum(0), values, strict=True):
            np.testing.assert_array_equal(row, np.asarray(emb.weight)[value] if 0 <= value < 600 else np.zeros(4))


@pytest.mark.parametrize("dtype", [np.int64, slower(np.uint64)])
def test_64_bit_jax_ids_do_not_narrow_without_x64(mesh_of, dtype):
    mesh = mesh_of()
    emb = ParallelVocabEmbedding(24, 4, mesh)
    strict = ParallelVocabEmbedding(24, 4, mesh, invalid_ids="error")
    with jax.enable_x64(True):
        ids = jnp.array(np.array([2**32 + 5, 5], dtype))
    for out in (emb(ids), jax.jit(call)(emb, ids)):
        np.testing.assert_array_equal(np.asarray(out).sum(0), [np.zeros(4), np.asarray(emb.weight)[5]])
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        strict(ids)
    error, _ = jax.jit(checkify.checkify(call))(strict, ids)
    assert "ids[0]" in error.get()


@pytest.mark.parametrize("dtype", [np.int8, *map(slower, (np.uint8, np.int16, np.uint16))])
def test_narrow_ids_are_valid_in_checked_jit(mesh_of, dtype):
    emb = ParallelVocabEmbedding(2**17, 1, mesh_of(), invalid_ids="error")
    error, _ = jax.jit(checkify.checkify(call))(emb, jnp.array([5, 100], dtype))
    assert error.get() is None


def test_bfloat16_rows_of_any_bits(mesh_of):
    table = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16).reshape(-1, 1)
    emb = ParallelVocabEmbedding(65536, 1, mesh_of((2,)), dtype=jnp.bfloat16).with_weight(table)
    assert_same_bits(emb(np.arange(65536)), oracle(emb, np.arange(65536)))


def test_numpy_ids_are_checked_before_they_narrow(mesh_of):
    emb = ParallelVocabEmbedding(24, 4, mesh_of())
    assert not np.asarray(emb(np.array([2**32 + 5, 2**31 + 5, -(2**32)]))).any()
    np.testing.assert_array_equal(as_ids(np.array([2**32 + 5, 5]), 24), [-1, 5])
    ids = jnp.arange(3)
    assert as_ids(ids, 24) is ids
    assert as_ids(7, 24) == 7


@pytest.mark.parametrize("shape", [(), (3, 0, 2), slower((0,)), slower((5,)), slower((2, 3, 4, 5))])
def test_jax_ids_of_any_shape(mesh_of, rng, shape):
    emb = ParallelVocabEmbedding(24, 5, mesh_of((3,)))
    ids = rng.integers(0, 24, shape)
    assert_same_bits(emb(jnp.asarray(ids)), oracle(emb, ids))
    grad = jax.jit(jax.grad(lambda emb: emb(ids).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], np.bincount(ids.ravel(), minlength=24))


@pytest.mark.parametrize("world_size", [3, slower(1)])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [24, -1]], r"ids\[1, 0\] = 24 is outside the vocabulary \[0, 24\)"),
        slower([3, -5, 30], r"ids\[1\] = -5 is outside"),
        (-7, r"ids = -7 is outside"),
    ],
)
def test_invalid_ids_error_in_checked_jit(mesh_of, world_size, ids, message):
    emb = ParallelVocabEmbedding(24, 5, mesh_of((world_size,)), invalid_ids="error")
    ids = jnp.array(ids)
    with pytest.raises(IndexError, match=message):
        emb(ids)
    checked = jax.jit(checkify.checkify(call))
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checked(emb, ids)[0].throw()
    error, out = checked(emb, ids.clip(0, 23))
    error.throw()
    assert_same_bits(out, emb(ids.clip(0, 23)))


def test_invalid_ids_error_names_64_bit_ids_as_they_are(mesh_of):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        emb(np.array([2**32 + 5]))
    with pytest.raises(IndexError, match=r"ids\[1\] = 18446744073709551615 is outside"):
        emb(np.array([0, 2**64 - 1], np.uint64))


def test_invalid_ids_error_over_data_and_in_gradients(mesh_of):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(24, 5, mesh, invalid_ids="error", padding_idx=2)
    ids = on(mesh, np.array([[0, 1], [2, 30]]), "dp")
    with pytest.raises(IndexError, match=r"ids\[1, 1\] = 30"):
        emb(ids)
    gradient = jax.jit(checkify.checkify(lambda emb, ids: jax.grad(lambda emb: emb(ids).sum())(emb)))
    error, _ = gradient(emb, ids)
    assert "ids[1, 1] = 30 is outside the vocabulary" in error.get()
    error, grad = gradient(emb, ids - 3 * (ids > 3) * 9)
    assert error.get() is None
    np.testing.assert_array_equal(np.asarray(grad.weight)[:, 0], np.eye(24)[[0, 1, 3]].sum(0))


@pytest.mark.parametrize(
    ("kinds", "axis"),
    [
        (("Explicit", "Auto"), "tp"),
        (("Auto", "Explicit"), "dp"),
        slower(("Explicit", "Auto"), "dp"),
        slower(("Auto", "Explicit"), "tp"),
    ],
)
def test_invalid_ids_error_on_mixed_meshes(kinds, axis):
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds))
    with jax.set_mesh(mesh):
        emb = ParallelVocabEmbedding(24, 4, mesh, invalid_ids="error")
        ids = on(mesh, np.arange(8).reshape(4, 2), axis)
        error, out = jax.jit(checkify.checkify(call))(emb, ids)
        assert error.get() is None
        assert_same_bits(out, emb(ids))


def test_an_empty_batch_has_no_invalid_ids(mesh_of):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids="error")
    error, out = jax.jit(checkify.checkify(call))(emb, jnp.zeros((0,), int))
    assert error.get() is None
    assert out.shape == (8, 0, 5)
    assert emb(np.zeros((0, 2), int)).shape == (8, 0, 2, 5)


@pytest.mark.parametrize("invalid_ids", ["zero", "error"])
@pytest.mark.parametrize(
    ("ids", "given"),
    [
        (jnp.array([1.0]), "dtype float32"),
        (jnp.array([True]), "dtype bool"),
        ([1, 2], "list"),
        (True, "bool"),
        (1.5, "float"),
        (2**70, "object"),
    ],
)
def test_ids_that_are_no_integers_are_refused(mesh_of, invalid_ids, ids, given):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids=invalid_ids)
    for function in (call, *([jax.jit(call)] if isinstance(ids, jax.Array) else [])):
        with pytest.raises(TypeError, match=f"ids must be .* of an integer dtype, got {given}"):
            function(emb, ids)


@pytest.mark.parametrize(
    ("dtype", "exchange"),
    [(np.int8, "routed"), *map(slower, (np.int8, np.uint8, np.int16, np.uint16), ["dense", "routed"] * 2)],
)
def test_short_ids_are_widened_before_anything_else(dtype, exchange):
    """A vocabulary of which the ids' dtype can name a part: no sentinel and no padding_idx may wrap on to an id of it."""
    mesh, largest = make_mesh(), int(np.iinfo(dtype).max)
    vocab_size = 4 * (largest // 4 + 100)
    ids = np.array([[largest, 0, 44, -1, 1, 2, 3, largest - 1]]).astype(dtype)
    known = np.where((ids >= 0), ids.astype(np.int64), -1)
    for padding_idx in (vocab_size - 1, 256 + 44 if largest < 300 else None):
        if padding_idx is not None and padding_idx >= vocab_size:
            continue
        options = {"reduction": "reduce_scatter", "exchange": exchange, "padding_idx": padding_idx}
        emb = ParallelVocabEmbedding(vocab_size, 2, mesh, **options)
        expected = np.where((known >= 0)[..., None], np.asarray(emb.weight)[known], 0)
        given = jnp.asarray(ids)
        for function in (emb, jax.jit(emb)):
            np.testing.assert_array_equal(function(given), expected)
        gradient = jax.jit(jax.grad(lambda emb: emb(given).sum()))(emb).weight  # noqa: B023
        counts = np.bincount(known[known >= 0], minlength=vocab_size)
        np.testing.assert_array_equal(np.asarray(gradient)[:, 0], counts)


def test_accelerators_copy_rows_as_floats(monkeypatch):
    """The form for accelerators, run on a CPU: every row's bits, and the fill's sign of zero."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cpu, default: default(*arguments))
    table = jnp.array([[1.0, -0.0], [0.0, 1e-40], [-jnp.inf, 3.0]], jnp.float32)
    keys, negative = jnp.array([[0, 1], [2, 3], [3, 0]]), jnp.array([[False, False], [False, True], [False, True]])

    @jax.jit
    def run(table, keys, negative):
        return gather(table, keys, fill=jnp.where(negative, -0.0, 0.0)[..., None])

    rows = np.append(np.asarray(table), np.zeros((1, 2), np.float32), axis=0)[np.asarray(keys)]
    rows[1, 1] = -0.0
    assert_same_bits(run(table, keys, negative), rows)
