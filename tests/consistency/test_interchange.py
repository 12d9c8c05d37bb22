"""Arrays handed from torch to JAX and back: the same memory or a copy of its own, always the same bits."""

import gc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from torch_layers import ranks_of

import jax_impl.dlpack as to_jax
import torch_impl.dlpack as to_torch
from jax_impl import ParallelVocabEmbedding

COPIES = (None, False, True)
WIDE = ["float64", "int64", "uint64", "complex128"]
FLOAT8 = [f"float8_{name}" for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")]
NARROW = [
    *["float32", "float16", "bfloat16", *FLOAT8, "complex64", "bool"],
    *["int8", "int16", "int32", "uint8", "uint16", "uint32"],
]


def tensor_of(dtype):
    """Every 16-bit pattern, NaN payloads, -0.0 and subnormals of all dtypes among them, aligned as torch does it."""
    patterns = torch.arange(2**16, dtype=torch.int32)
    if dtype == "bool":
        return patterns % 3 == 0
    halves = patterns.to(torch.int16)
    words = torch.stack([halves.flip(0), halves], -1)  # the upper half, with the exponent, last
    wide = getattr(torch, dtype).itemsize > 2
    return (words.ravel() if wide else halves).view(getattr(torch, dtype)).reshape(32, -1)


def tensor_bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def jax_bits(array):
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def address(array):
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", [*NARROW, *WIDE])
def test_there_and_back_bit_for_bit(dtype):
    tensor = tensor_of(dtype)
    for copy in COPIES:
        with jax.enable_x64(dtype in WIDE):
            array = to_jax.from_dlpack(tensor, copy=copy)
            back = to_torch.from_dlpack(array, copy=copy)
            assert (array.dtype.name, array.shape, back.dtype) == (dtype, tensor.shape, tensor.dtype)
            np.testing.assert_array_equal(jax_bits(array), tensor_bits(tensor))
            np.testing.assert_array_equal(tensor_bits(back), tensor_bits(tensor))
            assert [address(each) == address(tensor) for each in (array, back)] == [copy is not True] * 2


def base():
    return torch.arange(24 * 16, dtype=torch.float32).reshape(24, 16)


def read_only():
    room = np.zeros(64 * 33 * 4 + 64, np.uint8)
    table = room[-room.ctypes.data % 64 :][: 64 * 33 * 4].view(np.float32)
    table.flags.writeable = False
    return table


SHARED = {
    "torch's transposed": (to_jax, lambda: base().T),
    "NumPy's read-only": (to_jax, read_only),
    "JAX's own": (to_torch, lambda: jax.random.normal(jax.random.key(0), (7, 5), jnp.bfloat16)),
    "JAX's in a layout of its own": (to_torch, lambda: jax.dlpack.from_dlpack(base().T)),
    "NumPy's bfloat16": (to_torch, lambda: np.arange(60).astype(ml_dtypes.bfloat16)),  # which NumPy hands to nobody
    "NumPy's stepped": (to_torch, lambda: np.arange(6.0)[::2]),
}


@pytest.mark.parametrize("name", SHARED)
def test_memory_that_can_be_shared_is(name):
    importer, make = SHARED[name]
    given = make()
    imported = importer.from_dlpack(given, copy=False)
    assert address(imported) == (given.ctypes.data if isinstance(given, np.ndarray) else address(given))
    found, expected = (tensor_bits(x) if isinstance(x, torch.Tensor) else jax_bits(x) for x in (imported, given))
    np.testing.assert_array_equal(found, expected)


UNSHARED = {
    "stepped": (to_jax, lambda: base()[::2], "trivial .compact. striding"),
    "columns": (to_jax, lambda: base()[:, :8], "trivial .compact. striding"),
    "expanded": (to_jax, lambda: base()[:1].expand(9, 16), "trivial .compact. striding"),
    "one element in": (to_jax, lambda: base().ravel()[1:], "aligned to 4 bytes, and JAX .* shares 64-byte-aligned"),
    "two rows in": (to_jax, lambda: base()[:, :4].contiguous()[2:], "aligned to 32 bytes, and JAX on a CPU shares"),
    "NumPy's columns": (to_jax, lambda: base().numpy()[:, :8], "not row-major"),
    "reversed": (to_torch, lambda: np.arange(6.0)[::-1], r"torch has no negative strides, and its strides are \(-8,\)"),
    "read-only": (to_torch, lambda: np.broadcast_to(np.arange(6.0), 6), "it is read-only, and torch writes to any"),
    "packed": (to_torch, lambda: np.zeros(25, np.uint8)[1:].view(np.float64), "not aligned to its elements of 8 bytes"),
}


@pytest.mark.parametrize("name", UNSHARED)
def test_memory_that_cannot_be_shared_is_copied_or_refused(name):
    importer, make, reason = UNSHARED[name]
    given = make()
    with pytest.raises(ValueError, match=reason if importer is to_jax else f"got False, but .*{reason}"):
        importer.from_dlpack(given, copy=False)
    for copy in (None, True):
        imported, expected = importer.from_dlpack(given, copy=copy), np.asarray(given).copy()
        np.testing.assert_array_equal(np.asarray(imported), expected, strict=True)
        if importer is to_torch:  # what is written to a copy shows nowhere else
            imported += 1
            np.testing.assert_array_equal(given, expected)
        else:
            (given[0] if name == "expanded" else given)[:] += 1
            np.testing.assert_array_equal(np.asarray(imported), expected)


PRODUCERS = [
    (to_jax.from_dlpack, lambda view: view),
    (to_jax.from_dlpack, torch.from_numpy),
    (to_torch.from_dlpack, lambda view: view),
    (to_torch.from_dlpack, lambda view: jax.device_put(view, may_alias=True)),
]


@pytest.mark.parametrize(("importing", "producer"), PRODUCERS)
@pytest.mark.parametrize("copy", COPIES)
def test_memory_lives_as_long_as_its_last_user(importing, producer, copy):
    owner = np.zeros(4160, np.uint8)
    gone = weakref.ref(owner)
    start = -owner.ctypes.data % 64
    imported = importing(producer(owner[start : start + 4096].view(np.float32)), copy=copy)
    del owner
    gc.collect()
    assert (gone() is None) == (copy is True)
    part = imported[1000:]
    del imported
    gc.collect()
    assert float(part.sum()) == 0
    del part
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copy", COPIES)
def test_what_the_other_cannot_take_is_refused(copy):
    for dtype in ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float4_e2m1fn"):
        with pytest.raises(ValueError, match=f"array must have a dtype that torch has too, got {dtype}"):
            to_torch.from_dlpack(jnp.zeros(4, dtype), copy=copy)
    with pytest.raises(ValueError, match="array must have a dtype that JAX has too, got float4_e2m1fn_x2"):
        to_jax.from_dlpack(torch.zeros(4, dtype=torch.float4_e2m1fn_x2), copy=copy)
    for dtype in WIDE:  # nothing narrows
        tensor = torch.tensor([2**31 + 5]).to(getattr(torch, dtype))
        says = f"got {dtype}, which it would narrow to .*: set jax_enable_x64, .* or call jax_impl.as_ids"
        with pytest.raises(ValueError, match=says):
            to_jax.from_dlpack(tensor, copy=copy)
        with pytest.raises(ValueError, match=says):
            to_jax.array_from_dlpack([tensor], NamedSharding(mesh_of(1), P("tp")), copy=copy)


@pytest.mark.parametrize("importing", [to_jax.from_dlpack, to_torch.from_dlpack])
def test_what_cannot_be_handed_out_is_refused(importing):
    for error, says, given, copies in (
        (ValueError, r"require gradient, use tensor.detach\(\)", torch.ones(3, requires_grad=True), COPIES),
        (ValueError, r"call resolve_neg\(\) first", torch.ones(3, dtype=torch.complex64).conj().imag, COPIES),
        (ValueError, "got a refusal: .*meta", torch.ones(3, device="meta"), COPIES),
        (ValueError, "got a refusal: ", torch.eye(3).to_sparse(), COPIES),
        (TypeError, "array must have __dlpack__ and __dlpack_device__", [1.0], COPIES),
        (TypeError, "array must have __dlpack__ and __dlpack_device__", None, COPIES),
        (TypeError, "copy must be None, True or False, got ", np.zeros(3), ("never", 1, np.True_)),
    ):
        for copy in copies:
            with pytest.raises(error, match=says):
                importing(given, copy=copy)
    with pytest.raises(TypeError, match="[Tt]race"):
        jax.jit(importing)(1.0)


def mesh_of(*shape, first=0, order=1):
    names = ("dp", "tp")[-len(shape) :]
    devices = np.array(jax.devices()[first : first + np.prod(shape)])[::order].reshape(shape)
    return jax.sharding.Mesh(devices, names)


LAYOUTS = {
    "8 reversed": (8, lambda: NamedSharding(mesh_of(8, order=-1), P("tp", None))),
    "3 of 8": (3, lambda: NamedSharding(mesh_of(3, first=4), P("tp", None))),
    "replicas": (4, lambda: NamedSharding(mesh_of(2, 4), P("tp", None))),
    "two axes": (8, lambda: NamedSharding(mesh_of(2, 4), P(("tp", "dp")))),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_parts_make_one_sharded_array_that_goes_out_by_ranks(layout, copy):
    (ranks, sharding), shared = LAYOUTS[layout], copy is not True
    sharding, tensors = sharding(), [torch.full((4, 16), float(rank)).bfloat16() for rank in range(ranks)]
    array = to_jax.array_from_dlpack(tensors, sharding, copy=copy)
    assert (array.shape, array.dtype, array.sharding) == ((ranks * 4, 16), jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(array)[:, 0], np.repeat(np.arange(ranks), 4))
    assert len(array.addressable_shards) == sharding.mesh.size
    for shard in array.addressable_shards:
        assert (address(shard.data) == address(tensors[(shard.index[0].start or 0) // 4])) == shared
    tensors[-1].fill_(100)
    assert float(array[-1, 0]) == (100 if shared else ranks - 1)

    array = array + 0  # replicas that have memory of their own
    found = to_torch.shards_from_dlpack(array, copy=copy)
    assert len(found) == ranks
    first = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards if shard.replica_id == 0}
    for rank, tensor in enumerate(found):
        np.testing.assert_array_equal(jax_bits(array[rank * 4 : rank * 4 + 4]), tensor_bits(tensor))
        assert (address(tensor) == address(first[rank * 4])) == shared
    found[0].fill_(100)
    assert bool((array[0] == 100).all()) == shared


@pytest.mark.parametrize("shape", [(1,), (2, 4)])
def test_donated_memory_of_torch_is_not_written_to(shape):
    mesh = mesh_of(*shape)
    tensors = [torch.full((4, 16), float(rank)) for rank in range(mesh.shape["tp"])]
    array = to_jax.array_from_dlpack(tensors, NamedSharding(mesh, P("tp", None)), copy=False)
    result = jax.jit(lambda x: x * 2 + x.shape[0], donate_argnums=0)(array)
    np.testing.assert_array_equal(result, 2 * torch.cat(tensors) + len(result))
    assert [tensor.unique().tolist() for tensor in tensors] == [[rank] for rank in range(len(tensors))]


def test_parts_of_several_kinds_and_parts_that_must_be_copied():
    parts = [torch.arange(9.0)[1:].reshape(4, 2), jnp.ones((4, 2)), np.arange(8, dtype=np.float32).reshape(2, 4).T]
    sharding = NamedSharding(mesh_of(3), P("tp"))
    array = to_jax.array_from_dlpack(parts, sharding)
    expected = np.concatenate([np.asarray(part) for part in parts])
    parts[0].zero_(), parts[2].fill(0)
    np.testing.assert_array_equal(np.asarray(array), expected, strict=True)
    with pytest.raises(ValueError, match="aligned to 4 bytes"):
        to_jax.array_from_dlpack(parts, sharding, copy=False)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (1,), (1, 1, 3), ()])
def test_unusual_shapes(shape):
    tensor = torch.full(shape, 7.0)
    for copy in COPIES:
        array = to_jax.from_dlpack(tensor, copy=copy)
        back = to_torch.from_dlpack(array, copy=copy)
        for each in (array, back):
            np.testing.assert_array_equal(np.asarray(each), tensor.numpy(), strict=True)
        assert not tensor.numel() or (address(back) == address(tensor)) == (copy is not True)
    if shape:
        array = to_jax.array_from_dlpack([tensor, tensor + 1], NamedSharding(mesh_of(4, 2), P("tp")))
        np.testing.assert_array_equal(np.asarray(array), torch.cat([tensor, tensor + 1]).numpy(), strict=True)


def test_a_replicated_array_goes_out_and_comes_in_whole():
    sharding = NamedSharding(mesh_of(2, 4), P())
    for value in (torch.ones(4, 16), torch.tensor(5.0)):
        array = to_jax.array_from_dlpack([value], sharding, copy=False)
        assert array.sharding.is_fully_replicated
        assert {address(shard.data) for shard in array.addressable_shards} == {address(value)}
        for tensor in (to_torch.from_dlpack(array, copy=False), *to_torch.shards_from_dlpack(array, copy=False)):
            assert torch.equal(tensor, value)
            assert address(tensor) == address(value)


def test_what_cannot_go_out_by_ranks():
    table = np.zeros((8, 8), np.float32)
    split = jax.device_put(table, NamedSharding(mesh_of(8), P("tp")))
    with pytest.raises(ValueError, match=r"of shape \(8, 8\) split into parts of shape \(1, 8\); shards_from_dlpack"):
        to_torch.from_dlpack(split)
    for spec in (P(None, "tp"), P("dp", "tp")):
        with pytest.raises(ValueError, match="array must be split along dimension 0 only, got parts of shape"):
            to_torch.shards_from_dlpack(jax.device_put(table, NamedSharding(mesh_of(2, 4), spec)))
    with pytest.raises(TypeError, match="must have addressable_shards, .* got Tensor; pass .* to from_dlpack"):
        to_torch.shards_from_dlpack(torch.zeros(3))
    with pytest.raises(ValueError, match="got a refusal: __dlpack__ only supported for unsharded|over 8 devices"):
        to_jax.from_dlpack(split)


def test_parts_that_make_no_array():
    mesh, parts = mesh_of(2, 4), [torch.zeros(4, 8) for _ in range(4)]
    over_tp, over_both = NamedSharding(mesh, P("tp", None)), NamedSharding(mesh, P("dp", "tp"))
    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    many = r"^shards must .* devices, 4 with .*'tp'.* on a mesh \{'dp': 2, 'tp': 4\}, got"
    short, half = torch.zeros(4, 7), parts[0].half()
    for wrong, sharding, error, says in (
        ([*parts[:3], short], over_tp, ValueError, r"\(4, 8\) of float32 first and \(4, 7\) .* shards\[3\]"),
        ([*parts[:3], half], over_tp, ValueError, r"and \(4, 8\) of float16 as shards\[3\]"),
        (parts[:3], over_tp, ValueError, f"{many} 3"),
        (parts * 2, over_tp, ValueError, f"{many} 8"),
        ([], over_tp, ValueError, "^shards must .*at least one array"),
        (parts[:2], over_both, ValueError, "sharding must split dimension 0 only, got .*'tp'.* for parts of shape"),
        (torch.zeros(4, 4, 8), over_tp, TypeError, "shards must be a sequence of arrays, one per rank, got Tensor"),
        (parts, on_one_device, TypeError, "sharding must be a jax.sharding.NamedSharding, got SingleDeviceSharding"),
        ([torch.nn.Parameter(part) for part in parts], over_tp, ValueError, "detach"),
    ):
        with pytest.raises(error, match=says):
            to_jax.array_from_dlpack(wrong, sharding)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_weights_of_one_layer_in_the_other(kind):
    ranks = ranks_of(48, 32, 4, dtype=torch.bfloat16)
    layer = ParallelVocabEmbedding(48, 32, make_mesh((2, 4), ("dp", "tp"), kind), dtype=jnp.bfloat16)
    weights = [emb.weight.detach() for emb in ranks]
    given = layer.with_weight(to_jax.array_from_dlpack(weights, layer.weight.sharding, copy=False))
    for shard in given.weight.addressable_shards:
        assert address(shard.data) == address(weights[(shard.index[0].start or 0) // 12])
    ids = np.arange(-2, 50)
    of_torch = [tensor_bits(emb(torch.from_numpy(ids)).detach()) for emb in ranks]
    np.testing.assert_array_equal(jax_bits(given(ids)), np.stack(of_torch))
    for tensor, rows in zip(to_torch.shards_from_dlpack(given.weight, copy=False), weights, strict=True):
        assert torch.equal(tensor, rows)
