"""Memory as DLPack describes it, from NumPy and from producers made by hand."""

import ctypes
import gc
import weakref
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from shared.bits import unsigned_view
from shared.dlpack import ALIGNMENT, Memory, exportable

FLOAT8 = ["e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"]
DTYPES = [
    *[
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ],
    *[ml_dtypes.bfloat16, *[getattr(ml_dtypes, f"float8_{name}") for name in FLOAT8]],
]
FLOAT32 = {"code": 2, "bits": 32}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Unversioned(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, DESTRUCTOR)(
    ("PyCapsule_New", ctypes.pythonapi)
)
name_at = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_GetName", ctypes.pythonapi))


class Producer:
    """An array handed out as the arguments say; notes under which name each capsule ended."""

    kept: ClassVar[list] = []  # a capsule that ends calls its producer

    def __init__(
        self, array, shape, strides, *, code, bits, lanes=1, device=(1, 0), byte_offset=0, version=None, flags=0
    ):
        Producer.kept.append(self)
        self.array, self.ended = array, []
        self.numbers = [np.array(each, np.int64) for each in (shape, strides or ())]
        lengths, steps = (each.ctypes.data for each in self.numbers)
        tensor = Tensor(
            *(array.ctypes.data if array is not None else 0, device, len(shape), code, bits, lanes),
            *(lengths, steps if strides is not None else None, byte_offset),
        )
        self.struct = Versioned(version, None, None, flags, tensor) if version else Unversioned(tensor, None, None)
        self.name = b"dltensor_versioned" if version else b"dltensor"
        self.end = DESTRUCTOR(lambda capsule: self.ended.append(name_at(capsule)))

    def __dlpack__(self, stream=None):  # as before DLPack 1, without max_version
        return new_capsule(ctypes.addressof(self.struct), self.name, self.end)

    def __dlpack_device__(self):
        return tuple(self.struct.tensor.device)


BASE = np.arange(240, dtype=np.float32).reshape(12, 20)
LAYOUTS = {
    "row-major": BASE,
    "rows": BASE[3:5],
    "one row": BASE[3:4, ::1],
    "transposed": BASE.T,
    "stepped": BASE[::2, ::3],
    "offset": BASE[1:, 1:],
    "reversed": BASE[::-1, ::-1],
    "expanded": np.broadcast_to(BASE[:, :1], (12, 5)),
    "swapped": BASE.reshape(3, 4, 20).transpose(1, 0, 2),
    "0-d": BASE[0, 0, ...],
    "lengths of one": BASE[:1, None, ::2][:, :, :1],
    "empty": BASE[:0],
    "empty transposed": BASE[:, :0].T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    array = LAYOUTS[layout]
    memory = Memory.of(array)
    assert (memory.shape, memory.size, memory.dtype, memory.device) == (array.shape, array.size, array.dtype, (1, 0))
    assert memory.is_row_major == array.flags.c_contiguous
    view, copied = memory.view(), memory.copy()
    np.testing.assert_array_equal(view, array, strict=True)
    np.testing.assert_array_equal(copied, array, strict=True)
    assert copied.flags.c_contiguous
    assert not np.shares_memory(copied, array)
    if array.size:
        assert copied.ctypes.data % ALIGNMENT == 0
        assert memory.pointer == array.ctypes.data == view.ctypes.data
        assert memory.strides == tuple(step // 4 for step in array.strides)
        assert np.shares_memory(view, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_bit_for_bit(dtype):
    every = np.arange(2**16, dtype=np.uint16)
    array = every % 3 == 0 if dtype == "bool" else every.view(dtype)
    for given in (array, array[::-3]):
        memory = Memory.of(given)
        assert memory.dtype == array.dtype
        for each in (memory.view(), memory.copy()):
            assert each.dtype == array.dtype
            np.testing.assert_array_equal(unsigned_view(each), unsigned_view(given))


@pytest.mark.parametrize(("code", "name"), [(code, name) for code, name in enumerate(FLOAT8, start=7)])
def test_the_codes_of_float8(code, name):
    array = np.arange(256, dtype=np.uint8)
    memory = Memory.of(Producer(array, (256,), None, code=code, bits=8))
    assert memory.dtype == getattr(ml_dtypes, f"float8_{name}")
    np.testing.assert_array_equal(memory.view().view(np.uint8), array)


@pytest.mark.parametrize("unknown", [{"code": 17, "bits": 4}, {**FLOAT32, "lanes": 2}, {"code": 2, "bits": 128}])
def test_an_unknown_dtype_has_no_view(unknown):
    memory = Memory.of(Producer(BASE, (2,), (1,), **unknown))
    assert memory.dtype is None
    for look in (memory.view, memory.copy):
        with pytest.raises(ValueError, match="of a dtype that NumPy knows"):
            look()


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
def test_strides_left_out_and_an_offset(version):
    memory = Memory.of(Producer(BASE, (4, 3), None, **FLOAT32, byte_offset=80, version=version))
    assert (memory.strides, memory.pointer, memory.is_row_major) == ((3, 1), BASE.ctypes.data + 80, True)
    np.testing.assert_array_equal(memory.view(), np.arange(20, 32, dtype=np.float32).reshape(4, 3))


def test_memory_elsewhere_is_described_and_not_read():
    memory = Memory.of(Producer(BASE, (2,), (1,), **FLOAT32, device=(2, 3)))
    assert (memory.device, memory.on_host) == ((2, 3), False)
    with pytest.raises(ValueError, match="memory must be the host's .* device=\\(2, 3\\)"):
        memory.view()


@pytest.mark.parametrize("device_type", [1, 3, 11])
def test_pinned_memory_is_the_hosts(device_type):
    memory = Memory.of(Producer(BASE, (2,), (1,), **FLOAT32, device=(device_type, 0)))
    assert memory.on_host
    np.testing.assert_array_equal(memory.view(), [0, 1])


def test_read_only_is_noted_and_no_view_can_be_written_to():
    array = BASE.copy()
    assert not Memory.of(array).read_only
    view = Memory.of(array).view()
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    array[0, 0] = 5
    assert view[0, 0] == 5
    array.flags.writeable = False
    assert Memory.of(array).read_only
    assert Memory.of(Producer(BASE, (2,), (1,), **FLOAT32, version=(1, 0), flags=1)).read_only
    assert not Memory.of(Producer(BASE, (2,), (1,), **FLOAT32, version=(1, 0), flags=6)).read_only


@pytest.mark.parametrize(("offset", "alignment"), [(0, 64), (1, 1), (2, 2), (4, 4), (24, 8), (48, 16), (32, 32)])
def test_alignment(offset, alignment):
    room = np.zeros(320, np.uint8)
    start = (64 - room.ctypes.data) % 128 + offset  # 64 past a multiple of 128, so that no power above is met
    memory = Memory.of(room[start : start + 8])
    assert memory.alignment == alignment


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_view_keeps_the_memory_and_its_end_releases_it_once(version):
    producer = Producer(BASE, (4,), (1,), **FLOAT32, version=version)
    memory = Memory.of(producer)
    view = memory.view()
    part = view[1:][::2]
    del memory, view
    gc.collect()
    assert producer.ended == []
    np.testing.assert_array_equal(part, [1, 3])
    del part
    gc.collect()
    assert producer.ended == [producer.name]


def test_a_view_keeps_the_array_of_numpy():
    array = np.arange(1000, dtype=np.float32).view()
    gone = weakref.ref(array.base)
    view = Memory.of(array).view()
    copied = Memory.of(array).copy()
    del array
    gc.collect()
    garbage = [np.full(1000, 7, np.float32) for _ in range(50)]
    np.testing.assert_array_equal(view, np.arange(1000))
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None
    np.testing.assert_array_equal(copied, np.arange(1000))
    del garbage


class Refusing:
    def __dlpack__(self, **options):
        raise BufferError("not today")

    def __dlpack_device__(self):
        return (1, 0)


class Odd(Refusing):
    def __dlpack__(self, **options):
        return 5


class Negative(Refusing):
    def is_neg(self):
        return True


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (Refusing(), "got a refusal: not today"),
        (Odd(), "got a refusal: .*PyCapsule"),
        (Negative(), "call resolve_neg"),
        (np.zeros(3, ">f4"), "native byte order"),
        (np.zeros(3, ml_dtypes.int4), "got a refusal"),
        (Producer(BASE, (2,), (1,), **FLOAT32, version=(2, 0)), "DLPack 0.x or 1.x"),
        (Producer(None, (2,), (1,), **FLOAT32), "a Producer whose address is 0"),
    ],
)
def test_what_cannot_be_handed_out(array, says):
    with pytest.raises(ValueError, match=says):
        Memory.of(array)


@pytest.mark.parametrize("array", [[1.0], 5, np.float32(3), None, b"1234"])
def test_what_is_no_array(array):
    with pytest.raises(TypeError, match=f"array must have __dlpack__ .*, got {type(array).__name__}; make an array"):
        Memory.of(array)


def test_only_the_dtypes_of_ml_dtypes_go_out_as_integers():
    array = np.zeros((2, 2), ml_dtypes.float8_e5m2).T
    assert (exportable(array).dtype, exportable(array).ctypes.data) == (np.uint8, array.ctypes.data)
    for each in (BASE, [1], None):
        assert exportable(each) is each
