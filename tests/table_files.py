"""Tables in files as tests make them: by the letter of the formats, independent of the code that reads them."""

import json

import numpy as np

NAMES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "uint8", "int64"]
CODES = dict(zip(NAMES, ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "U8", "I64"], strict=True))


def safetensors(header, data=b"", length=None):
    """The bytes of a safetensors file, whatever its header is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def save(path, tensors):
    """Write a safetensors file; return its path."""
    header, data = {}, b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": CODES[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}
        data += values.tobytes()
    path.write_bytes(safetensors(header, data))
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
