"""Reading a vocabulary table, rows at a time, from a safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from shared.bits import DTYPES, row_hashes

__all__ = ["TableFile", "open_safetensors"]

_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose faults come out as one ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


class TableFile:
    """A 2-D floating-point tensor in a safetensors file: its sizes, and its rows on demand.

    Args:
        path: the file.
        tensor: the tensor's name; left out, the file must hold exactly one 2-D floating-point tensor.

    Raises:
        ValueError: there is no such file or tensor, it is no safetensors file, or the choice is not clear.
    """

    def __init__(self, path: Path, tensor: str | None = None) -> None:
        self.path = Path(path)
        with open_safetensors(self.path) as file:
            names = list(file.keys())
            tables = [n for n in names if self._is_table(file.get_slice(n))]
            if tensor is None and len(tables) != 1:
                found = ", ".join(tables) or "none"
                raise ValueError(f"{path}: name the tensor to use; 2-D floating-point tensors in it: {found}")
            self.tensor = tables[0] if tensor is None else tensor
            if self.tensor not in names:
                raise ValueError(f"{path}: no tensor {self.tensor!r} in it; there are: {', '.join(names) or 'none'}")
            header = file.get_slice(self.tensor)
            if not self._is_table(header):
                raise ValueError(
                    f"{path}: tensor {self.tensor!r} must be a 2-D table of {', '.join(DTYPES)}, "
                    f"got {header.get_dtype()} {header.get_shape()}"
                )
            self.vocab_size, self.emb_size = header.get_shape()
            self.dtype = _NAMES[header.get_dtype()]

    @staticmethod
    def _is_table(header: Any) -> bool:
        shape = header.get_shape()
        return header.get_dtype() in _NAMES and len(shape) == 2 and 0 not in shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)``; nothing else of the file is read.

        Raises:
            IndexError: the range leaves the table.
        """
        if not 0 <= start <= stop <= self.vocab_size:
            raise IndexError(f"rows [{start}, {stop}) leave the table's [0, {self.vocab_size})")
        with open_safetensors(self.path) as file:
            return np.asarray(file.get_slice(self.tensor)[start:stop])

    def chunks(self, megabytes: int = 64) -> Iterator[np.ndarray]:
        """All rows in order, some at a time."""
        step = max(1, (megabytes << 20) // (self.emb_size * DTYPES[self.dtype].itemsize))
        with open_safetensors(self.path) as file:
            table = file.get_slice(self.tensor)
            for start in range(0, self.vocab_size, step):
                yield np.asarray(table[start : min(start + step, self.vocab_size)])

    def fingerprint(self) -> tuple[str, np.ndarray]:
        """The SHA-256 of the tensor's bytes, and each row's hash, uint64 ``[v]``."""
        digest, hashes = hashlib.sha256(), []
        for chunk in self.chunks():
            digest.update(np.ascontiguousarray(chunk).view(np.uint8).data)
            hashes.append(row_hashes(chunk))
        return digest.hexdigest(), np.concatenate(hashes)
