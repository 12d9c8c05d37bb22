"""The safetensors format: headers and places of tensors."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.bits import STORED_DTYPES

__all__ = [
    "STORAGE_CODES",
    "TensorPlace",
    "check_file",
    "header_bytes",
    "open_safetensors",
    "parse_object",
    "read_header",
]

STORAGE_CODES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Dtype codes of safetensors, by the name of the dtype."""

_DTYPES = {code: name for name, code in STORAGE_CODES.items()}
_ALIGNMENT = 64


def check_file(path: Path) -> None:
    """Raise ValueError unless there is a regular file."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object; ``source`` names it in errors.

    The text may be damaged or hostile.

    Raises:
        ValueError: it is not a JSON object, repeats a key, or holds NaN or an infinity.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a repeated key")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not well-formed JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: must hold a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; ValueError if missing or damaged."""
    check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


@dataclass(frozen=True)
class TensorPlace:
    """Dtype code, shape and first byte of a tensor in a file."""

    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> str | None:
        """Name of the dtype; None unless 2-D, floating-point and not empty."""
        return _DTYPES.get(self.code) if len(self.shape) == 2 and 0 not in self.shape else None


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Read the header only: each tensor's place, by name.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """
    with open_safetensors(path), open(path, "rb") as raw:  # the library checks sizes and offsets
        length = int.from_bytes(raw.read(8), "little")
        header = parse_object(raw.read(length), f"{path}: header")
    header.pop("__metadata__", None)
    try:
        return {
            name: TensorPlace(str(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (KeyError, TypeError) as error:  # the library also takes a list of the three, and a dtype in an object
        raise ValueError(f"{path}: a damaged header ({error})") from error


def header_bytes(tensor: str, dtype: str, shape: tuple[int, int], metadata: dict[str, str]) -> bytes:
    """Header of a safetensors file of one tensor, padded to 64 bytes."""
    size = math.prod(shape) * STORED_DTYPES[dtype].itemsize
    entry = {"dtype": STORAGE_CODES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, tensor: entry}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
