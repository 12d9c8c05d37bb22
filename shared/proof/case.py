"""Inputs of a comparison: table, ids and gradient, in files."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import save_file

from shared.bits import DTYPES, cast, dtype_named
from shared.checks import check_size
from shared.config import LOOKUP_OPTIONS, EmbeddingConfig
from shared.ids import widen
from shared.padding_rules import padded_by_rule
from shared.proof.generate import exact_gradient, table_chunks, zipf_ids
from shared.sequence import chunk_shape, resolve_seq_dim
from shared.tables.find_table import open_table
from shared.tables.table_file import TableFile
from shared.tables.tensor_file import check_file, open_safetensors

__all__ = ["Case", "CaseFacts", "CaseOptions", "Progress", "build_case", "find_inputs", "sha256"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the amount done and the total."""


@dataclass(frozen=True)
class CaseOptions:
    """Options of a case, as the command line takes them.

    Attributes:
        weights, tensor: path of the table and name of its tensor; None generates a table.
        ids: a ``.npy`` file of integers; None generates ids, unless there is a text.
        tokenizer, text: a ``tokenizer.json``, and a text file to tokenise with it.
        vocab_size, emb_size, dtype: of a generated table; with ``weights``, sizes it must have and the dtype to cast to.
        padded_vocab_size: a rule of ``shared.padding_rules``.
        world_size, padding_idx, reduction, exchange, seq_dim: as in ``EmbeddingConfig``.
        seed: of everything that is generated.
    """

    weights: Path | None = None
    tensor: str | None = None
    ids: Path | None = None
    tokenizer: Path | None = None
    text: Path | None = None
    vocab_size: int | None = None
    emb_size: int | None = None
    dtype: str | None = None
    world_size: int = 8
    padded_vocab_size: str | None = None
    padding_idx: int | None = None
    reduction: str = "none"
    exchange: str = "auto"
    seq_dim: int = -1
    seed: int = 0


@dataclass(frozen=True)
class CaseFacts:
    """Facts of a case, independent of its files.

    ``partition`` and the options of the lookup in ``config`` are attributes too. ``source`` is the origin of table and ids
    in words, ``seed`` that of everything generated. ``checksums`` are SHA-256 of the bytes of ``weights`` and of the batch.
    """

    config: EmbeddingConfig
    dtype: str
    ids_shape: tuple[int, ...]
    source: str
    seed: int
    checksums: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in ("partition", *LOOKUP_OPTIONS):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.config, name)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts and options of the lookup, by name, as plain values."""
        options = {name: getattr(self.config, name) for name in LOOKUP_OPTIONS}
        return options | {each.name: getattr(self, each.name) for each in fields(CaseFacts) if each.name != "config"}

    @classmethod
    def from_stored(cls, stored: dict[str, Any], **more: Any) -> Self:
        """Restore from ``facts`` after JSON.

        Raises:
            KeyError, TypeError, ValueError: facts are missing or invalid.
        """
        known = {name: stored.pop(name) for name in LOOKUP_OPTIONS}
        shape = tuple(stored.pop("ids_shape"))
        return cls(config=EmbeddingConfig(**known), ids_shape=shape, **stored, **more)

    @property
    def in_chunks(self) -> bool:
        """Whether a rank's result belongs to its chunk of the ids."""
        return self.reduction in ("reduce_scatter", "all_to_all")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the ids of one rank's result."""
        if not self.in_chunks:
            return self.ids_shape
        return chunk_shape(self.ids_shape, self.seq_dim, self.world_size)

    def part_of(self, array: np.ndarray, rank: int) -> np.ndarray:
        """Cut one rank's part out of ids or an embedding."""
        if not self.in_chunks:
            return array
        dim = resolve_seq_dim(len(self.ids_shape), self.seq_dim)
        return np.ascontiguousarray(np.split(array, self.world_size, axis=dim)[rank])

    def whole_of(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Concatenate the ranks' parts, unless each is the whole."""
        if not self.in_chunks:
            return parts[0]
        return np.concatenate(parts, axis=resolve_seq_dim(len(self.ids_shape), self.seq_dim))


@dataclass(frozen=True)
class Case(CaseFacts):
    """A case on disk, stored as ``case.json`` in its folder.

    ``weights`` is the path of the table, ``tensor`` the name in it. ``batch`` is a safetensors file with ``ids``, int64,
    ``grad_output`` ``[*ids.shape, e]`` and ``row_hashes`` ``[v]``.
    """

    weights: str
    tensor: str
    batch: str

    @classmethod
    def write(
        cls,
        folder: Path,
        table: TableFile,
        batch: dict[str, np.ndarray],
        *,
        config: EmbeddingConfig,
        ids_shape: tuple[int, ...],
        source: str,
        seed: int,
        **more: Any,
    ) -> Self:
        """Write a case to its folder; ``more`` are further fields."""
        weights_sum, row_hashes = table.fingerprint()
        path = folder / "batch.safetensors"
        save_file({**batch, "row_hashes": row_hashes}, path)
        files: dict[str, Any] = {
            "weights": str(table.path.absolute()),
            "tensor": table.tensor,
            "batch": str(path.absolute()),
        }
        checksums = {"weights": weights_sum, **{name: sha256(array) for name, array in batch.items()}}
        facts = {"config": config, "ids_shape": ids_shape, "source": source, "seed": seed, **more}
        case = cls(**files, dtype=table.dtype, checksums=checksums, **facts)
        (folder / "case.json").write_text(json.dumps(case.facts | files))
        return case

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a case from its folder."""
        return cls.from_stored(json.loads((folder / "case.json").read_text()))

    @cached_property
    def table(self) -> TableFile:
        """The open table."""
        return open_table(Path(self.weights), self.tensor, self.vocab_size)

    def rank_rows(self, rank: int) -> np.ndarray:
        """Rows of ``rank``, padding included."""
        return self.table.padded_rows(self.partition, rank, DTYPES[self.dtype])

    def batch_array(self, name: str) -> np.ndarray:
        """Read ``ids``, ``grad_output`` or ``row_hashes``."""
        with open_safetensors(Path(self.batch)) as file:
            return np.asarray(file.get_tensor(name))


def sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def build_case(options: CaseOptions, folder: Path, progress: Progress = lambda *_: None) -> Case:
    """Write the files of a case to ``folder``.

    Raises:
        ValueError, TypeError, IndexError: an option is out of range, a file is invalid, or options contradict each other.
    """
    if options.reduction == "none" and options.exchange != "auto":
        raise ValueError(
            f"--exchange {options.exchange} needs a reduction, got none: add --reduction all_reduce or reduce_scatter"
        )
    table, ids, config, source = find_inputs(options, folder, (131072, 1024), table_chunks, (4, 2048), progress)
    if options.reduction in ("reduce_scatter", "all_to_all"):
        chunk_shape(ids.shape, options.seq_dim, options.world_size)
    progress("gradient and checksums", 0, 1)
    grad_output = exact_gradient(ids, table.emb_size, DTYPES[table.dtype], options.seed)
    batch = {"ids": ids, "grad_output": grad_output}
    return Case.write(folder, table, batch, config=config, ids_shape=ids.shape, source=source, seed=options.seed)


def find_inputs(
    options: CaseOptions,
    folder: Path,
    sizes: tuple[int, int],
    chunks: Callable[[int, int, np.dtype, int], Iterator[np.ndarray]],
    ids_shape: tuple[int, ...],
    progress: Progress,
) -> tuple[TableFile, np.ndarray, EmbeddingConfig, str]:
    """Read the given table and ids; generate what is not given.

    ``chunks`` generates a table of these sizes in chunks of rows.

    Returns:
        Table, ids, options, and the origin of table and ids.

    Raises:
        ValueError, TypeError, IndexError: as in ``build_case``.
    """
    ids, table = _given_ids(options), None
    if options.weights is None:
        if options.tensor is not None:
            raise ValueError("--tensor needs --weights, the file that holds the tensor: add --weights FILE")
        vocab_size = check_size("vocab_size", sizes[0] if options.vocab_size is None else options.vocab_size)
        emb_size = check_size("emb_size", sizes[1] if options.emb_size is None else options.emb_size)
        dtype, source = dtype_named(options.dtype or "bfloat16"), f"generated table, seed {options.seed}"
        rows = chunks(vocab_size, emb_size, dtype, options.seed)
    else:
        table = open_table(options.weights, options.tensor, options.vocab_size)
        vocab_size, emb_size, path, stored = table.vocab_size, table.emb_size, table.path, table.dtype
        if options.emb_size not in (None, emb_size):
            raise ValueError(f"emb_size must be that of the table: asked for {options.emb_size}, {path} has {emb_size}")
        if options.dtype is None and stored not in DTYPES:
            raise ValueError(f"--dtype must be given for a table of {stored}, to cast it: one of {', '.join(DTYPES)}")
        dtype, source = dtype_named(options.dtype or stored), f"{table.tensor} of {options.weights.name}"
        source += "" if dtype.name == stored else f", cast to {dtype.name}"
        rows = (cast(chunk, dtype) for chunk in table.chunks())
    padded = padded_by_rule(options.padded_vocab_size, vocab_size, options.world_size)
    given = {name: getattr(options, name) for name in ("reduction", "exchange", "seq_dim", "padding_idx")}
    config = EmbeddingConfig(vocab_size, emb_size, options.world_size, padded, **given)
    if table is None or table.dtype != dtype.name:
        table = _write_table(folder, np.empty((vocab_size, emb_size), dtype), rows, progress)
    ids_source = f"ids of {(options.ids or options.text or Path()).name}"
    if ids is None:
        ids_source = f"Zipf-distributed ids, seed {options.seed}"
        ids = zipf_ids(ids_shape, config.partition, options.seed)
    return table, ids, config, f"{source}; {ids_source}"


def _write_table(folder: Path, table: np.ndarray, chunks: Iterator[np.ndarray], progress: Progress) -> TableFile:
    filled = 0
    for chunk in chunks:
        table[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
        progress("table", filled, len(table))
    save_file({"weight": table}, folder / "weights.safetensors")
    return open_table(folder / "weights.safetensors", "weight")


def _given_ids(options: CaseOptions) -> np.ndarray | None:
    if options.ids is not None and (options.tokenizer is not None or options.text is not None):
        raise ValueError("--ids excludes --tokenizer and --text: give ids in one way")
    if (options.tokenizer is None) != (options.text is None):
        raise ValueError("--tokenizer and --text need each other: give a tokenizer.json and the text to tokenise")
    if options.tokenizer is not None and options.text is not None:
        return _tokenise(options.tokenizer, options.text)
    if options.ids is None:
        return None
    try:
        with open(options.ids, "rb") as file:
            ids = np.load(file, allow_pickle=False)
    except Exception as error:  # a hostile file can make NumPy raise anything
        raise ValueError(f"{options.ids}: not a readable .npy file of integers ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        raise ValueError(f"{options.ids}: ids must be one array of integers, got {getattr(ids, 'dtype', type(ids))}")
    return np.array(widen(ids), order="C")


def _tokenise(tokenizer: Path, text: Path) -> np.ndarray:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            "--tokenizer needs the tokenizers package: pip install 'parallel-vocab-embedding[text]'"
        ) from None
    for path in (tokenizer, text):
        check_file(path)
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{text}: not a readable file of UTF-8 text ({error})") from error
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{tokenizer}: not a tokenizer.json ({error})") from error
    return np.array([loaded.encode(words).ids], np.int64)
