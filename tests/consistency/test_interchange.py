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

import jax_impl.dlpack as to_jax
import torch_impl.dlpack as to_torch
from jax_impl import ParallelVocabEmbedding as JaxEmbedding
from torch_impl import ParallelVocabEmbedding as TorchEmbedding

COPIES = (None, False, True)
WIDE = ["float64", "int64", "uint64", "complex128"]
FLOAT8 = [f"float8_{name}" for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")]
NARROW = [
    *["float32", "float16", "bfloat16", *FLOAT8, "complex64", "bool"],
    *["int8", "int16", "int32", "uint8", "uint16", "uint32"],
]
UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("dtype", [*NARROW, *WIDE])
def test_there_and_back_bit_for_bit(dtype, copy):
    tensor, shared = tensor_of(dtype), copy is not True
    with jax.enable_x64(dtype in WIDE):
        array = to_jax.from_dlpack(tensor, copy=copy)
        back = to_torch.from_dlpack(array, copy=copy)
        assert (array.dtype.name, array.shape, back.dtype) == (dtype, tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(jax_bits(array), tensor_bits(tensor))
        np.testing.assert_array_equal(tensor_bits(back), tensor_bits(tensor))
        assert [address(each) == address(tensor) for each in (array, back)] == [shared, shared]


def test_arrays_of_jax_and_numpy_are_shared(rng):
    array = jax.random.normal(jax.random.key(0), (7, 5), jnp.bfloat16)
    assert address(to_torch.from_dlpack(array, copy=False)) == address(array)
    table = np.zeros((64, 33), ml_dtypes.bfloat16)  # NumPy itself hands no bfloat16 out
    tensor = to_torch.from_dlpack(table, copy=False)
    assert (tensor.dtype, address(tensor)) == (torch.bfloat16, table.ctypes.data)
    tensor[0, 0] = 3
    assert table[0, 0] == 3
    np.testing.assert_array_equal(jax_bits(to_jax.from_dlpack(table)), jax_bits(table))
    room = np.zeros(64 * 33 * 4 + 64, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][: 64 * 33 * 4].view(np.float32)
    aligned.flags.writeable = False
    assert address(to_jax.from_dlpack(aligned, copy=False)) == aligned.ctypes.data


def base():
    return torch.arange(24 * 16, dtype=torch.float32).reshape(24, 16)


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


def test_strides_of_ones_own_are_shared():
    tensor = base().T
    array = to_jax.from_dlpack(tensor, copy=False)
    assert address(array) == address(tensor)
    np.testing.assert_array_equal(np.asarray(array + 1), tensor.numpy() + 1)
    array = jax.dlpack.from_dlpack(base().T)  # JAX in a layout of its own
    tensor = to_torch.from_dlpack(array, copy=False)
    assert (tensor.stride(), address(tensor)) == ((1, 16), address(array))
    strided = np.arange(6.0)[::2]
    assert address(to_torch.from_dlpack(strided, copy=False)) == strided.ctypes.data


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (), (1,), (1, 1, 3)])
@pytest.mark.parametrize("copy", COPIES)
def test_unusual_shapes(shape, copy):
    tensor = torch.full(shape, 7.0)
    array = to_jax.from_dlpack(tensor, copy=copy)
    np.testing.assert_array_equal(np.asarray(array), np.full(shape, 7, np.float32), strict=True)
    back = to_torch.from_dlpack(array, copy=copy)
    np.testing.assert_array_equal(back.numpy(), np.full(shape, 7, np.float32), strict=True)
    if tensor.numel():
        assert (address(back) == address(tensor)) == (copy is not True)


def test_donated_memory_of_torch_is_not_written_to():
    tensor = torch.zeros(1024)
    imported = to_jax.from_dlpack(tensor, copy=False)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(imported)
    assert float(result.sum()) == 1024
    assert not tensor.any()


def test_memory_outlives_its_producer():
    tensor = torch.arange(5000, dtype=torch.float32)
    array = to_jax.from_dlpack(tensor, copy=False)
    source = jnp.arange(5000, dtype=jnp.float32) * 1
    imported = to_torch.from_dlpack(source, copy=False)
    part = imported[1000:]
    del tensor, source, imported
    gc.collect()
    garbage = [(torch.full((5000,), -1.0), jnp.full(5000, -1.0), np.full(5000, -1, np.float32)) for _ in range(50)]
    np.testing.assert_array_equal(np.asarray(array), np.arange(5000))
    np.testing.assert_array_equal(part.numpy(), np.arange(1000, 5000))
    del garbage


@pytest.mark.parametrize("importing", [to_jax.from_dlpack, to_torch.from_dlpack])
@pytest.mark.parametrize("copy", COPIES)
def test_memory_is_released_with_its_last_user(importing, copy):
    owner = np.zeros(4160, np.uint8)
    gone = weakref.ref(owner)
    start = -owner.ctypes.data % 64
    imported = importing(owner[start : start + 4096].view(np.float32), copy=copy)
    del owner
    gc.collect()
    assert (gone() is None) == (copy is True)
    assert float(imported.sum()) == 0
    del imported
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", WIDE)
def test_nothing_narrows(dtype):
    tensor = torch.tensor([2**31 + 5]).to(getattr(torch, dtype))
    says = f"got {dtype}, which it would narrow to .*: set jax_enable_x64, .* or call jax_impl.as_ids"
    for copy in COPIES:
        with pytest.raises(ValueError, match=says):
            to_jax.from_dlpack(tensor, copy=copy)
        with pytest.raises(ValueError, match=says):
            to_jax.array_from_dlpack([tensor], NamedSharding(mesh_of(1), P("tp")), copy=copy)


def test_what_the_other_cannot_take_is_refused():
    for dtype in ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float4_e2m1fn"):
        with pytest.raises(ValueError, match=f"array must have a dtype that torch has too, got {dtype}"):
            to_torch.from_dlpack(jnp.zeros(4, dtype))
    with pytest.raises(ValueError, match="array must have a dtype that JAX has too, got float4_e2m1fn_x2"):
        to_jax.from_dlpack(torch.zeros(4, dtype=torch.float4_e2m1fn_x2))
    for importing in (to_jax.from_dlpack, to_torch.from_dlpack):
        for copy in COPIES:
            for tensor, says in (
                (torch.ones(3, requires_grad=True), r"require gradient, use tensor.detach\(\)"),
                (torch.ones(3, dtype=torch.complex64).conj().imag, r"call resolve_neg\(\) first"),
                (torch.ones(3, device="meta"), "got a refusal: .*meta"),
                (torch.eye(3).to_sparse(), "got a refusal: "),
            ):
                with pytest.raises(ValueError, match=says):
                    importing(tensor, copy=copy)
        for given in ([1.0], 5, None, np.float32(1)):
            with pytest.raises(TypeError, match="array must have __dlpack__ and __dlpack_device__"):
                importing(given)
        for copy in ("never", 1, np.True_):
            with pytest.raises(TypeError, match="copy must be None, True or False, got "):
                importing(np.zeros(3), copy=copy)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: to_torch.from_dlpack(x))(1.0)


def mesh_of(*shape, first=0, order=1):
    names = ("dp", "tp")[-len(shape) :]
    devices = np.array(jax.devices()[first : first + np.prod(shape)])[::order].reshape(shape)
    return jax.sharding.Mesh(devices, names)


MESHES = {
    "1": lambda: mesh_of(1),
    "8": lambda: mesh_of(8),
    "8 reversed": lambda: mesh_of(8, order=-1),
    "2x4": lambda: mesh_of(2, 4),
    "3 of 8": lambda: mesh_of(3, first=4),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_ranks_parts_make_one_sharded_array_that_goes_out_by_ranks(mesh, copy):
    mesh, shared = MESHES[mesh](), copy is not True
    world_size, sharding = mesh.shape["tp"], NamedSharding(mesh, P("tp", None))
    tensors = [torch.full((4, 16), float(rank)).bfloat16() for rank in range(world_size)]
    array = to_jax.array_from_dlpack(tensors, sharding, copy=copy)
    assert (array.shape, array.dtype, array.sharding) == ((world_size * 4, 16), jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(array)[:, 0], np.repeat(np.arange(world_size), 4))
    assert len(array.addressable_shards) == mesh.size
    for shard in array.addressable_shards:
        rank = (shard.index[0].start or 0) // 4
        assert (address(shard.data) == address(tensors[rank])) == shared
    tensors[-1].fill_(100)
    assert float(array[-1, 0]) == (100 if shared else world_size - 1)

    array = array + 0  # replicas that have memory of their own
    found = to_torch.shards_from_dlpack(array, copy=copy)
    assert len(found) == world_size
    for rank, tensor in enumerate(found):
        np.testing.assert_array_equal(jax_bits(array[rank * 4 : rank * 4 + 4]), tensor_bits(tensor))
        device = mesh.devices.reshape(-1, world_size)[0, rank]
        (shard,) = [shard.data for shard in array.addressable_shards if shard.device == device]
        assert (address(tensor) == address(shard)) == shared
    found[0].fill_(100)
    assert bool((array[0] == 100).all()) == shared


@pytest.mark.parametrize("donated", [False, True])
def test_replicas_that_share_memory_compute_as_others_do(donated):
    tensors = [torch.full((4, 16), float(rank)) for rank in range(4)]
    array = to_jax.array_from_dlpack(tensors, NamedSharding(mesh_of(2, 4), P("tp", None)), copy=False)
    result = jax.jit(lambda x: x * 2 + x.sum(), donate_argnums=(0,) if donated else ())(array)
    np.testing.assert_array_equal(np.asarray(result)[:, 0], np.repeat(np.arange(4), 4) * 2 + 6 * 64)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]


def test_parts_of_several_kinds_and_parts_that_must_be_copied():
    parts = [torch.arange(9.0)[1:].reshape(4, 2), jnp.ones((4, 2)), np.arange(8, dtype=np.float32).reshape(2, 4).T]
    sharding = NamedSharding(mesh_of(3), P("tp"))
    array = to_jax.array_from_dlpack(parts, sharding)
    expected = np.concatenate([np.asarray(part) for part in parts])
    parts[0].zero_(), parts[2].fill(0)
    np.testing.assert_array_equal(np.asarray(array), expected, strict=True)
    with pytest.raises(ValueError, match="aligned to 4 bytes"):
        to_jax.array_from_dlpack(parts, sharding, copy=False)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3,), (2, 3, 2)])
def test_parts_of_unusual_shapes(shape):
    parts = [torch.full(shape, float(rank)) for rank in range(4)]
    array = to_jax.array_from_dlpack(parts, NamedSharding(mesh_of(2, 4), P("tp")))
    np.testing.assert_array_equal(np.asarray(array), torch.cat(parts).numpy(), strict=True)


def test_rows_split_over_two_axes_of_the_mesh():
    sharding = NamedSharding(mesh_of(2, 4), P(("tp", "dp")))
    tensors = [torch.full((2, 16), float(rank)) for rank in range(8)]
    array = to_jax.array_from_dlpack(tensors, sharding, copy=False)
    np.testing.assert_array_equal(np.asarray(array)[:, 0], np.repeat(np.arange(8), 2))
    back = to_torch.shards_from_dlpack(array, copy=False)
    assert [address(tensor) for tensor in back] == [address(tensor) for tensor in tensors]


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
    for wrong, sharding, error, says in (
        (
            [*parts[:3], torch.zeros(4, 7)],
            over_tp,
            ValueError,
            r"\(4, 8\) of float32 first and \(4, 7\) .* shards\[3\]",
        ),
        ([*parts[:3], parts[0].half()], over_tp, ValueError, r"and \(4, 8\) of float16 as shards\[3\]"),
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


@pytest.mark.parametrize("mesh", ["8", "2x4", "explicit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_of_one_layer_in_the_other(rng, mesh, dtype):
    mesh = jax.make_mesh((4,), ("tp",)) if mesh == "explicit" else MESHES[mesh]()
    world_size = mesh.shape["tp"]
    ids = rng.integers(-2, 50, (3, 40)).astype(np.int32)
    ranks = [
        TorchEmbedding(48, 32, r, world_size, dtype=getattr(torch, dtype), padding_idx=7) for r in range(world_size)
    ]
    layer = JaxEmbedding(48, 32, mesh, dtype=dtype, padding_idx=7)

    def torch_bits(ranks):
        return np.stack([tensor_bits(emb(torch.from_numpy(ids)).detach()) for emb in ranks])

    weights = [emb.weight.detach() for emb in ranks]
    array = to_jax.array_from_dlpack(weights, NamedSharding(mesh, P("tp", None)), copy=False)
    given = layer.with_weight(array)
    for shard in given.weight.addressable_shards:
        assert address(shard.data) == address(weights[shard.index[0].start // (48 // world_size)])
    np.testing.assert_array_equal(jax_bits(given(ids)), torch_bits(ranks))

    tensors = to_torch.shards_from_dlpack(layer.weight, copy=True)
    for emb, tensor in zip(ranks, tensors, strict=True):
        emb.weight = torch.nn.Parameter(tensor)
    np.testing.assert_array_equal(torch_bits(ranks), jax_bits(layer(ids)))
    assert (torch_bits(ranks) != jax_bits(given(ids))).any()
