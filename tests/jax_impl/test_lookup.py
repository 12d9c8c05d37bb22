"""What the contract's tests do not ask of JAX: jit, checkify, JAX's own ids, and meshes of several axes and kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from marks import slower
from meshes import assert_is_right, assert_same_bits, make_mesh, on

from jax_impl import ParallelVocabEmbedding, as_ids
from jax_impl.lookup import gather

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def call(emb, ids):
    return emb(ids)


checked_call = jax.jit(checkify.checkify(call))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("jit", [False, True])
def test_partials_and_gradients_on_a_mesh_of_several_axes(mesh_of, rng, jit):
    mesh = mesh_of((2, 2, 2), ("dp", "tp", "sp"))
    emb = ParallelVocabEmbedding(48, 6, mesh, dtype=jnp.bfloat16, padding_idx=17)
    ids = np.concatenate([np.arange(-2, 50), rng.integers(0, 48, 500), np.full(300, 17)])
    assert_is_right(emb, ids.astype(np.int32).reshape(4, -1), jit)


@pytest.mark.parametrize("x64", [False, True])
def test_no_integer_dtype_narrows_in_jit(x64):
    emb = ParallelVocabEmbedding(600, 4, make_mesh((3,)))
    strict = ParallelVocabEmbedding(600, 4, emb.mesh, invalid_ids="error")
    values = {}
    for dtype in INTEGERS:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        large = 199, 200, 399, 400, 599, 600, 2**31 + 5, 2**32, 2**32 + 5, 2**63, 2**63 + 5, 2**64 - 1
        some = [0, 5, 100, 127, least, most, *(value for value in large if value <= most)]
        values[dtype] = np.resize(np.array(some, dtype), 18)
    with jax.enable_x64(True):
        given = {dtype: jnp.asarray(ids) for dtype, ids in values.items()}
    with jax.enable_x64(x64):
        found = [jax.jit(lambda emb, ids: jax.tree.map(emb, ids))(emb, given), jax.tree.map(emb, given)]
    assert checked_call(strict, jnp.array([5, 100], np.int8))[0].get() is None
    table = np.asarray(emb.weight)
    for dtype, ids in values.items():
        rows = [table[int(value)] if 0 <= value < 600 else np.zeros(4, np.float32) for value in ids]
        for partials in found:
            np.testing.assert_array_equal(np.asarray(partials[dtype]).sum(0), rows, err_msg=dtype)


def test_invalid_64_bit_ids_are_named_without_x64():
    emb = ParallelVocabEmbedding(24, 4, make_mesh(), invalid_ids="error")
    with jax.enable_x64(True):
        ids = jnp.array([2**32 + 5, 5])
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        emb(ids)
    assert "ids[0]" in checked_call(emb, ids)[0].get()


def test_as_ids_keeps_what_is_right():
    ids = jnp.arange(3)
    assert as_ids(ids, 24) is ids
    assert as_ids(7, 24) == 7
    np.testing.assert_array_equal(as_ids(np.array([2**32 + 5, 5]), 24), [-1, 5])


@pytest.mark.parametrize("shape", [(), (3, 0, 2)])
def test_jax_ids_of_any_shape(mesh_of, rng, shape):
    emb = ParallelVocabEmbedding(24, 5, mesh_of((3,)))
    ids = rng.integers(0, 24, shape)
    expected = np.asarray(emb.weight)[ids]
    np.testing.assert_array_equal(np.asarray(emb(jnp.asarray(ids))).sum(0), expected)
    grad = jax.jit(jax.grad(lambda emb: emb(ids).sum()))(emb).weight
    np.testing.assert_array_equal(np.asarray(grad)[:, 0], np.bincount(ids.ravel(), minlength=24))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 1], [24, -1]], r"ids\[1, 0\] = 24 is outside the vocabulary \[0, 24\)"), (-7, r"ids = -7 is outside")],
)
def test_invalid_ids_error_in_checked_jit(ids, message):
    emb = ParallelVocabEmbedding(24, 5, make_mesh((3,)), invalid_ids="error")
    ids = jnp.array(ids)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checked_call(emb, ids)[0].throw()
    error, out = checked_call(emb, ids.clip(0, 23))
    error.throw()
    assert_same_bits(out, emb(ids.clip(0, 23)))


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


@pytest.mark.parametrize(("kinds", "axis"), [(("Explicit", "Auto"), "tp"), (("Auto", "Explicit"), "dp")])
def test_invalid_ids_error_on_mixed_meshes(kinds, axis):
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds))
    with jax.set_mesh(mesh):
        emb = ParallelVocabEmbedding(24, 4, mesh, invalid_ids="error")
        ids = on(mesh, np.arange(8).reshape(4, 2), axis)
        error, out = checked_call(emb, ids)
        assert error.get() is None
        assert_same_bits(out, emb(ids))


def test_an_empty_batch_has_no_invalid_ids(mesh_of):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), invalid_ids="error")
    error, out = checked_call(emb, jnp.zeros((0,), int))
    assert error.get() is None
    assert out.shape == (8, 0, 5)
    assert emb(np.zeros((0, 2), int)).shape == (8, 0, 2, 5)


@pytest.mark.parametrize("invalid_ids", ["zero", "error"])
def test_ids_that_are_no_integers_are_refused(invalid_ids):
    emb = ParallelVocabEmbedding(24, 5, make_mesh(), invalid_ids=invalid_ids)
    on_host = [([1, 2], "list"), (True, "bool"), (1.5, "float"), (2**70, "object")]
    for ids, given in [(jnp.array([1.0]), "dtype float32"), (jnp.array([True]), "dtype bool"), *on_host]:
        for function in (call, *([jax.jit(call)] if isinstance(ids, jax.Array) else [])):
            with pytest.raises(TypeError, match=f"ids must be .* of an integer dtype, got {given}"):
                function(emb, ids)


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "exchange", "padding_idx"),
    [(np.int8, 524, "routed", 300), slower(np.int8, 524, "dense", 523), slower(np.uint8, 652, "routed", 300)],
)
def test_short_ids_are_widened_before_anything_else(dtype, vocab_size, exchange, padding_idx):
    """The dtype can name a part of the vocabulary: no sentinel and no padding_idx may wrap on to an id of it."""
    largest = np.iinfo(dtype).max
    ids = jnp.array([[largest, 0, 44, -1, 1, 2, 3, largest - 1]]).astype(dtype)
    options = {"reduction": "reduce_scatter", "exchange": exchange, "padding_idx": padding_idx}
    assert_is_right(ParallelVocabEmbedding(vocab_size, 2, make_mesh(), **options), ids)


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
