"""What a lookup returns, in every bit, against NumPy's own indexing of the whole table."""

import numpy as np
import pytest
from contract.backends import DTYPES

from shared.bits import unsigned_view
from shared.partition import VocabPartition

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
V, E = 48, 6


def table_of(dtype="float32", shape=(V, E)):
    table = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    table[3], table[V // 2 if shape[0] == V else 1], table[-1] = -0.0, np.nan, np.inf
    table[0] = np.array(1, unsigned_view(table).dtype).view(table.dtype)  # the smallest subnormal number
    return table


def expected(table, ids, rank, world_size, padded=None):
    """Rank ``rank``'s incomplete embedding by plain indexing: rows of exact bits, zero bits elsewhere."""
    n = VocabPartition(len(table), world_size, padded).rows_per_rank
    output = np.zeros((*ids.shape, table.shape[1]), table.dtype)
    for position in np.ndindex(ids.shape):
        if rank * n <= int(ids[position]) < min(rank * n + n, len(table)):
            output[position] = table[int(ids[position])]
    return output


def assert_bits(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(unsigned_view(np.ascontiguousarray(found)), unsigned_view(wanted))


def assert_is_right(layer, table, ids, world_size, padded=None):
    found = layer.lookup(ids)
    assert len(found) == world_size
    for rank, partial in enumerate(found):
        assert_bits(partial, expected(table, ids, rank, world_size, padded))


@pytest.mark.parametrize(
    ("dtype", "shape", "world_size", "padded"),
    [
        ("float16", (V, E), 1, None),
        ("bfloat16", (V, E), 8, None),
        ("float32", (V, E), 3, None),
        ("float64", (V, E), 2, None),
        ("bfloat16", (12, 1), 3, None),
        ("float32", (12, 64), 3, None),
        ("float16", (8, 3), 8, None),
        ("float32", (10, 4), 4, 24),
        ("float32", (10, 4), 8, "even"),
        ("float32", (10, 4), 1, 12),
    ],
)
def test_own_rows_are_bits_and_all_else_is_plus_zero(backend, dtype, shape, world_size, padded, rng):
    """Down to one row a rank, with an odd number of columns, and with ranks of padding alone."""
    table = table_of(dtype, shape)
    some = [np.arange(-2, shape[0] + 2), np.arange(20, 30), rng.integers(0, shape[0], 60), [2**40, -(2**62)]]
    assert_is_right(
        backend(table, world_size, padded_vocab_size=padded), table, np.concatenate(some), world_size, padded
    )


@pytest.mark.parametrize("dtype", INTEGERS)
def test_no_integer_dtype_of_ids_narrows(backend, dtype):
    table, info = table_of(shape=(600, 4)), np.iinfo(dtype)
    values = [0, 5, 100, 127, info.min, info.max, *(v for v in (199, 200, 399, 400, 599, 600) if v <= info.max)]
    if info.bits == 64:
        values += [2**31 + 5, 2**32, 2**32 + 5]
    if info.max >= 2**63:
        values += [2**63, 2**63 + 5, 2**64 - 1]
    assert_is_right(backend(table, 3), table, np.array(values, dtype), 3)


@pytest.mark.parametrize(("shape", "world_size"), [((), 3), ((), 1), ((3, 0, 2), 3), ((0,), 1), ((2, 3, 4, 5), 1)])
def test_any_shape(backend, shape, world_size, rng):
    table, ids = table_of(), np.array(rng.integers(0, V, shape))
    layer = backend(table, world_size)
    assert_is_right(layer, table, ids, world_size)
    for grad in layer.gradients(ids, np.ones((*shape, E), table.dtype)):
        assert grad.shape == (V // world_size, E)
        assert ids.size or not grad.any()


@pytest.mark.parametrize("world_size", [3, 1])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [V, -1]], rf"ids\[1, 0\] = {V} is outside the vocabulary \[0, {V}\)"),
        ([3, -5, 50], r"ids\[1\] = -5 is outside"),
        (2**40, r"ids = 1099511627776 is outside"),
    ],
)
def test_invalid_ids_error_names_the_first(backend, world_size, ids, message):
    layer = backend(table_of(), world_size, invalid_ids="error")
    with pytest.raises(IndexError, match=message):
        layer.lookup(np.array(ids))
    assert_is_right(layer, table_of(), np.array([[0, V - 1]]), world_size)


def test_an_id_in_the_padding_is_invalid(backend):
    layer = backend(table_of(shape=(10, 4)), 4, padded_vocab_size="even", invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[1\] = 10 is outside the vocabulary \[0, 10\)"):
        layer.lookup(np.array([9, 10]))


def test_invalid_unsigned_ids_are_named_as_they_are(backend):
    layer = backend(table_of(), 1, invalid_ids="error")
    with pytest.raises(IndexError, match=r"ids\[0\] = 18446744073709551615 is outside"):
        layer.lookup(np.array([2**64 - 1], np.uint64))


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), np.array([1j]), "1"])
@pytest.mark.parametrize("invalid_ids", ["zero", "error"])
def test_ids_that_are_no_integers_are_refused(backend, ids, invalid_ids):
    with pytest.raises(TypeError, match="ids must be a.* of an integer dtype, got"):
        backend(table_of(), 1, invalid_ids=invalid_ids).lookup(ids)


def test_a_vocabulary_that_does_not_divide_is_refused(backend):
    with pytest.raises(ValueError, match=r"vocab_size=50 over world_size=8 .* next size that divides is 56"):
        backend(table_of(shape=(50, 2)), 8)
