"""What the contract's tests do not ask of JAX: jit, checkify, JAX's own ids, and meshes of several axes and kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import assert_is_right, assert_same_bits, make_mesh, on

from jax_impl import ParallelVocabEmbedding, as_ids
from jax_impl.lookup import gather

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def call(emb, ids):
    return emb(ids)


checked_call = jax.jit(checkify.checkify(call))


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


def test_invalid_ids_are_named_without_x64():
    emb = ParallelVocabEmbedding(24, 4, make_mesh(), invalid_ids="error")
    with jax.enable_x64(True):
        ids = jnp.array([2**32 + 5, 5])
    with pytest.raises(IndexError, match=r"ids\[0\] = 4294967301 is outside"):
        emb(ids)
    assert "ids[0]" in checked_call(emb, ids)[0].get()
    with pytest.raises(checkify.JaxRuntimeError, match="ids = -7 is outside"):
        checked_call(emb, jnp.array(-7))[0].throw()


def test_as_ids_keeps_what_is_right():
    ids = jnp.arange(3)
    assert as_ids(ids, 24) is ids
    assert as_ids(7, 24) == 7


def with_gradient(emb, ids):
    return emb(ids), jax.grad(lambda emb: emb(ids).sum())(emb).weight


@pytest.mark.parametrize(
    ("kinds", "spec", "options"),
    [
        (("Auto", "Auto"), P("dp"), {}),
        (("Explicit", "Auto"), P("tp"), {}),
        (("Auto", "Explicit"), P("dp"), {}),
        (("Auto", "Auto"), P(), {"reduction": "reduce_scatter", "exchange": "routed"}),
        slower(("Explicit", "Explicit"), P("dp"), {}),
        slower(("Auto", "Auto"), P("tp"), {"reduction": "all_to_all"}),
    ],
)
def test_invalid_ids_error(kinds, spec, options):
    """Outside jit by an IndexError, inside by checkify, in gradients too."""
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds))
    ids = np.arange(32, dtype=np.int32).reshape(8, 4) % 24
    valid, invalid = (on(mesh, ids + 30 * wrong, *spec) for wrong in (False, ids == 9))
    checked = jax.jit(checkify.checkify(with_gradient))
    with jax.set_mesh(mesh):
        emb = ParallelVocabEmbedding(24, 5, mesh, invalid_ids="error", padding_idx=2, **options)
        error, (output, gradient) = checked(emb, valid)
        assert error.get() is None
        assert_same_bits(output, assert_is_right(emb, valid, jit=False))
        counts = np.bincount(ids.ravel(), minlength=24) * (np.arange(24) != 2)
        np.testing.assert_array_equal(np.asarray(gradient)[:, 0], counts)
        error, _ = checked(emb, invalid)
        assert "ids[2, 1] = 39 is outside the vocabulary [0, 24)" in error.get()
        with pytest.raises(IndexError, match=r"ids\[2, 1\] = 39 is outside the vocabulary \[0, 24\)"):
            emb(invalid)


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
