"""Where the tensors of a safetensors file lie in it, and reading and writing their bytes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.bits import STORED_DTYPES
from shared.tables.strict_json import parse_object

__all__ = [
    "STORAGE_CODES",
    "Header",
    "TensorPlace",
    "header_bytes",
    "open_safetensors",
    "read_exactly",
    "read_header",
    "write_exactly",
]

STORAGE_CODES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""What a safetensors header calls the dtypes in which a table can be stored."""

_DTYPES = {code: name for name, code in STORAGE_CODES.items()}
_ALIGNMENT = 64
_PIECE = 1 << 30  # one read or write of the operating system moves at most 2 GiB


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose faults come out as one ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file.

    Attributes:
        code: its dtype, as the header has it.
        shape: its shape.
        offset: the byte of the file where it begins.
    """

    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> str | None:
        """The name of the dtype, where a table can have it."""
        return _DTYPES.get(self.code)

    @property
    def is_table(self) -> bool:
        """Whether it has two dimensions, of floating-point numbers, and is not empty."""
        return self.dtype is not None and len(self.shape) == 2 and 0 not in self.shape


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    Attributes:
        tensors: by name.
        metadata: the texts that it carries.
    """

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Where everything in the file is; nothing but the header is read.

    Raises:
        ValueError: it is no whole safetensors file: missing, truncated, with offsets that overlap or leave it, and so on.
    """
    with open_safetensors(path) as file:  # the library refuses what does not hold together
        names = set(file.keys())
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = parse_object(raw.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", None) or {}
    places = {}
    try:
        for name, entry in header.items():
            shape = tuple(int(size) for size in entry["shape"])
            places[name] = TensorPlace(str(entry["dtype"]), shape, 8 + length + int(entry["data_offsets"][0]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: a damaged header ({error})") from error
    if set(places) != names:
        raise ValueError(f"{path}: a header that can be read in two ways")
    return Header(places, metadata)


def header_bytes(tensor: str, dtype: str, shape: tuple[int, int], metadata: dict[str, str]) -> bytes:
    """How a safetensors file of one tensor begins; the tensor's bytes follow, aligned to 64."""
    size = math.prod(shape) * STORED_DTYPES[dtype].itemsize
    entry = {"dtype": STORAGE_CODES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, tensor: entry}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` from byte ``offset`` of an open file.

    Raises:
        ValueError: the file ends before, or the disk fails.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + _PIECE]], offset + done)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise ValueError(f"{path}: truncated, it ends {len(buffer) - done} bytes early")
        done += count


def write_exactly(descriptor: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of ``buffer`` at byte ``offset`` of an open file."""
    done, view = 0, memoryview(buffer)
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _PIECE], offset + done)
