"""The lookup, against JAX's own on the whole table and against the NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl import ParallelVocabEmbedding, as_ids
from jax_impl.lookup import gather
from shared.bits import unsigned_view
from shared.proof.oracle import partial_lookup, sum_partials

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
MESHES = [((1,), ("tp",)), ((2,), ("tp",)), ((3,), ("tp",)), ((8,), ("tp",)), ((2, 2, 2), ("dp", "tp", "sp"))]


def oracle(emb, ids):
    table, n = np.asarray(emb.weight), emb.partition.rows_per_rank
    return [partial_lookup(table[r * n : r * n + n], ids, emb.partition, r) for r in range(emb.world_size)]


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(unsigned_view(np.ascontiguousarray(found)), unsigned_view(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "names"), MESHES)
def test_partials_are_the_oracles_and_sum_to_the_unsharded_lookup(mesh_of, rng, dtype, shape, names):
    emb = ParallelVocabEmbedding(48, 6, mesh_of(shape, names), dtype=dtype)
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, 48, 60)]).reshape(4, -1)
    partials = emb(ids)
    expected = oracle(emb, ids)
    assert partials.shape == (emb.world_size, *ids.shape, 6)
    assert_same_bits(partials, np.stack(expected))
    unsharded = np.asarray(emb.weight).take(ids.clip(0, 47), axis=0)
    unsharded[(ids < 0) | (ids >= 48)] = 0
    np.testing.assert_array_equal(sum_partials(expected), unsharded)
    np.testing.assert_array_equal(jnp.sum(partials, axis=0), unsharded)
    assert_same_bits(jax.jit(lambda emb, ids: emb(ids))(emb, ids.astype(np.int32)), np.stack(expected))


def test_float64(x64, mesh_of, rng):
    emb = ParallelVocabEmbedding(48, 6, mesh_of((3,)), dtype=jnp.float64)
    ids = rng.integers(-3, 51, (4, 5))
    assert_same_bits(emb(ids), np.stack(oracle(emb, ids)))
    assert_same_bits(emb(jnp.asarray(ids)), np.stack(oracle(emb, ids)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("as_jax", [False, True])
def test_any_integer_dtype_and_none_narrows(mesh_of, dtype, as_jax):
    emb = ParallelVocabEmbedding(600, 4, mesh_of((3,)))
    info = np.iinfo(dtype)
    values = [0, 5, 100, 127, *(v for v in (199, 200, 399, 400, 599, 600) if v <= info.max), info.min, info.max]
    if info.max >= 2**63:
        values += [2**63, 2**63 + 5, 2**64 - 1]
    if info.bits == 64:
        values += [2**31 + 5, 2**32, 2**32 + 5]
    ids = np.array(values, dtype)
    before = ids.copy()
    with jax.enable_x64(info.bits == 64 or jax.config.jax_enable_x64):
        out = emb(jnp.asarray(ids)) if as_jax else emb(ids)
        jitted = jax.jit(lambda emb, ids: emb(ids))(emb, jnp.asarray(ids))
    for result in (out, jitted):
        for row, value in zip(np.asarray(result).sum(0), values, strict=True):
            np.testing.assert_array_equal(row, np.asarray(emb.weight)[value] if 0 <= value < 600 else np.zeros(4))
    np.testing.assert_array_equal(ids, before)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_64_bit_jax_ids_do_not_narrow_where_64_bit_mode_is_off(mesh_of, dtype):
    mesh = mesh_of()
    emb = ParallelVocabEmbedding(24, 4, mesh)
    strict = ParallelVocabEmbedding(24, 4, mesh, invalid_ids="error")
    with jax.enable_x64(True):
        ids = jnp.array(np.array([2**32 + 5, 5], dtype))
    for out in (emb(ids), jax.jit(lambda emb, ids: emb(ids))(emb, ids)):
        np.testing.assert_array_equal(np.asarray(out).sum(0), [np.zeros(4), np.asarray(emb.weight)[5]])
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        strict(ids)
    error, _ = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))(strict, ids)
    assert "ids[0]" in error.get()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_narrow_ids_are_no_less_valid_for_being_checked_in_jit(mesh_of, dtype):
    emb = ParallelVocabEmbedding(2**17, 1, mesh_of(), invalid_ids="error")
    error, _ = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))(emb, jnp.array([5, 100], dtype))
    assert error.get() is None


def test_bfloat16_rows_of_any_bits(mesh_of):
    table = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16).reshape(-1, 1)
    emb = ParallelVocabEmbedding(65536, 1, mesh_of((2,)), dtype=jnp.bfloat16).with_weight(table)
    assert_same_bits(emb(np.arange(65536)), np.stack(oracle(emb, np.arange(65536))))


def test_numpy_ids_are_checked_before_they_narrow(mesh_of):
    emb = ParallelVocabEmbedding(24, 4, mesh_of())
    assert not np.asarray(emb(np.array([2**32 + 5, 2**31 + 5, -(2**32)]))).any()
    np.testing.assert_array_equal(as_ids(np.array([2**32 + 5, 5]), 24), [-1, 5])
    ids = jnp.arange(3)
    assert as_ids(ids, 24) is ids
    assert as_ids(7, 24) == 7


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4, 5)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_any_shape(mesh_of, rng, shape, world_size):
    emb = ParallelVocabEmbedding(24, 5, mesh_of((world_size,)))
    ids = rng.integers(0, 24, shape)
    assert_same_bits(emb(ids), np.stack(oracle(emb, ids)))
    assert_same_bits(emb(jnp.asarray(ids)), np.stack(oracle(emb, ids)))
    grad = jax.jit(jax.grad(lambda emb: emb(ids).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], np.bincount(ids.ravel(), minlength=24))


def test_holes_are_plus_zero_and_rows_are_bits(mesh_of):
    emb = ParallelVocabEmbedding(6, 4, mesh_of((2,)))
    table = np.array(emb.weight)
    table[:3] = [[-0.0, 0.0, 1e-45, -1e-45], [np.nan] * 4, [np.inf, -np.inf, 3e38, -0.0]]
    emb = emb.with_weight(table)
    ids = np.array([0, 1, 2, 3, 4, 5, -1, 6])
    assert_same_bits(emb(ids), np.stack(oracle(emb, ids)))
    assert np.asarray(emb(ids))[1, :3].any() == np.False_
    assert not unsigned_view(np.asarray(emb(ids))[0, 3:]).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [24, -1]], r"ids\[1, 0\] = 24 is outside the vocabulary \[0, 24\)"),
        ([3, -5, 30], r"ids\[1\] = -5 is outside"),
        (-7, r"ids = -7 is outside"),
    ],
)
def test_invalid_ids_error_names_the_first(mesh_of, world_size, ids, message):
    emb = ParallelVocabEmbedding(24, 5, mesh_of((world_size,)), invalid_ids="error")
    for given in (np.array(ids), jnp.array(ids)):
        with pytest.raises(IndexError, match=message):
            emb(given)
        assert emb(given.clip(0, 23)).shape == (world_size, *given.shape, 5)
        checked = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))
        error, _ = checked(emb, given)
        with pytest.raises(checkify.JaxRuntimeError, match=message):
            error.throw()
        error, out = checked(emb, given.clip(0, 23))
        error.throw()
        assert_same_bits(out, emb(given.clip(0, 23)))


def test_invalid_ids_error_names_64_bit_ids_as_they_are(mesh_of):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        emb(np.array([2**32 + 5]))
    with pytest.raises(IndexError, match=r"ids\[1\] = 18446744073709551615 is outside"):
        emb(np.array([0, 2**64 - 1], np.uint64))


def test_invalid_ids_error_with_ids_split_over_data_and_gradients(mesh_of):
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(24, 5, mesh, invalid_ids="error", padding_idx=2)
    ids = jax.device_put(np.array([[0, 1], [2, 30]]), NamedSharding(mesh, P("dp")))
    with pytest.raises(IndexError, match=r"ids\[1, 1\] = 30"):
        emb(ids)
    gradient = jax.jit(checkify.checkify(lambda emb, ids: jax.grad(lambda emb: emb(ids).sum())(emb)))
    error, _ = gradient(emb, ids)
    assert "ids[1, 1] = 30 is outside the vocabulary" in error.get()
    error, grad = gradient(emb, ids - 3 * (ids > 3) * 9)
    assert error.get() is None
    np.testing.assert_array_equal(np.asarray(grad.weight)[:, 0], np.eye(24)[[0, 1, 3]].sum(0))


@pytest.mark.parametrize("kinds", [("Explicit", "Auto"), ("Auto", "Explicit")])
@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_invalid_ids_error_on_mixed_meshes(kinds, axis):
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds))
    with jax.set_mesh(mesh):
        emb = ParallelVocabEmbedding(24, 4, mesh, invalid_ids="error")
        ids = jax.device_put(np.arange(8).reshape(4, 2), NamedSharding(mesh, P(axis)))
        error, out = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))(emb, ids)
        assert error.get() is None
        assert_same_bits(out, emb(ids))


def test_an_empty_batch_has_no_invalid_ids(mesh_of):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids="error")
    error, out = jax.jit(checkify.checkify(lambda emb, ids: emb(ids)))(emb, jnp.zeros((0,), int))
    assert error.get() is None
    assert out.shape == (8, 0, 5)
    assert emb(np.zeros((0, 2), int)).shape == (8, 0, 2, 5)


@pytest.mark.parametrize("invalid_ids", ["zero", "error"])
@pytest.mark.parametrize(
    ("ids", "given"),
    [
        (np.array([1.0]), "float64"),
        (np.array([True]), "bool"),
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
    with pytest.raises(TypeError, match=f"ids must be .* of an integer dtype, got {given}"):
        emb(ids)
    if isinstance(ids, jax.Array):
        with pytest.raises(TypeError, match=f"got {given}"):
            jax.jit(lambda emb, ids: emb(ids))(emb, ids)


@pytest.mark.parametrize("exchange", ["dense", "routed"])
@pytest.mark.parametrize(
    "dtype", [np.int8, *(pytest.param(d, marks=pytest.mark.slow) for d in (np.uint8, np.int16, np.uint16))]
)
def test_short_ids_are_widened_before_anything_else(dtype, exchange):
    """A vocabulary of which the ids' dtype can name a part: no sentinel and no padding_idx may wrap on to an id of it."""
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("tp",), (jax.sharding.AxisType.Auto,), devices=devices)
    largest = int(np.iinfo(dtype).max)
    vocab_size = 4 * (largest // 4 + 100)
    ids = np.array([[largest, 0, 44, -1, 1, 2, 3, largest - 1]]).astype(dtype)
    known = np.where((ids >= 0), ids.astype(np.int64), -1)
    for padding_idx in (vocab_size - 1, 256 + 44 if largest < 300 else None):
        if padding_idx is not None and padding_idx >= vocab_size:
            continue
        emb = ParallelVocabEmbedding(
            vocab_size, 2, mesh, reduction="reduce_scatter", exchange=exchange, padding_idx=padding_idx
        )
        table = np.asarray(emb.weight)
        expected = np.where((known >= 0)[..., None], table[known], 0)
        given = jnp.asarray(ids)
        for call in (emb, jax.jit(emb)):
            np.testing.assert_array_equal(call(given), expected)
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
    np.testing.assert_array_equal(unsigned_view(np.asarray(run(table, keys, negative))), unsigned_view(rows))
