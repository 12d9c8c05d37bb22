"""Tables in files as tests make them: by the letter of the formats, independent of the code that reads them."""

import json
import subprocess
import sys

import numpy as np

NAMES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "uint8", "int64"]
CODES = dict(zip(NAMES, ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "U8", "I64"], strict=True))


def safetensors(header, data=b"", length=None):
    """The bytes of a safetensors file, whatever its header is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(values, first=0):
    """What a header says about a tensor at byte ``first``."""
    offsets = [first, first + values.nbytes]
    return {"dtype": CODES[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}


def save(path, tensors):
    """Write a safetensors file; return its path."""
    header, data = {}, b""
    for name, values in tensors.items():
        header[name] = entry(values, len(data))
        data += values.tobytes()
    path.write_bytes(safetensors(header, data))
    return path


def save_zeros(path, rows, columns):
    """Write a float32 table of zeros that take no room on the disk; return its path."""
    size = rows * columns * 4
    header = safetensors({"wte.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return path


def save_index(path, files):
    """Write an index and its files, given the tensors of each; return the index's path."""
    for file, tensors in files.items():
        (path.parent / file).parent.mkdir(exist_ok=True)
        save(path.parent / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def save_parts(folder, parts, name="mp_rank_{:02d}", tensor="word_embeddings.weight"):
    """Write Megatron-style parts; return their files."""
    files = [folder / name.format(rank) / "model.safetensors" for rank in range(len(parts))]
    for file, rows in zip(files, parts, strict=True):
        file.parent.mkdir(parents=True)
        save(file, {tensor: rows})
    return files


def any_bits(rng, rows, columns, dtype):
    """Random bits: NaNs of every kind, infinities, subnormals and -0.0 among them."""
    return rng.integers(0, 256, (rows, columns * np.dtype(dtype).itemsize), np.uint8).view(dtype)


def bits(values):
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def assert_same(found, expected):
    """Dtype, shape and every bit are equal."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(bits(found), bits(expected))


def contents(folder):
    """Everything below a folder, byte for byte."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


# Not ru_maxrss: a new process begins with that of the one that started it, and pytest's may be large.
_GROWTH = """
import sys

def growth_of(work):
    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    kept = work()
    print(status("VmHWM") - before)

"""


def memory_growth(program, *arguments):
    """By how many bytes each ``growth_of(work)`` of a program, run in a process of its own, made its memory grow."""
    command = [sys.executable, "-c", _GROWTH + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]
