"""Search for a vocabulary table in safetensors files, checkpoints and Megatron-style parts."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from shared.checks import check_size, printable
from shared.partition import VocabPartition
from shared.tables.table_file import Segment, TableFile
from shared.tables.tensor_file import STORAGE_CODES, TensorPlace, check_file, parse_object, read_header

__all__ = ["PICKLE_SUFFIXES", "Paths", "open_table"]

_INPUT_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|wte|word_embeddings?|tok_embeddings?|token_embeddings?|token_embedder|tok_emb|token_embd"
    r"|embed_in|input_embeddings?|shared|embed|emb|embedding|embeddings)([./](weight|embedding|kernel))?$"
)
_ANOTHER_TABLE = re.compile(r"position|wpe|token_type|segment|lm_head|output|classifier|norm|bias", re.IGNORECASE)
_PART = re.compile(r"mp_rank_(\d+)")
_LARGEST_INDEX = 100 << 20

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of pickle files, which are never loaded."""

Paths = str | Path | Sequence[str | Path]
"""Location of a table: a file, a folder, or the files of Megatron-style parts in rank order."""


def open_table(
    path: Paths, tensor_name: str | None = None, vocab_size: int | None = None, *, with_padding: bool = False
) -> TableFile:
    """Open the vocabulary table at ``path`` without reading its rows.

    Args:
        path: a safetensors file; a Hugging Face ``*.index.json``; a folder that holds one of these; a folder of
            Megatron-style parts (``mp_rank_00`` and so on); or a list of the parts' files in rank order.
        tensor_name: name of the tensor. None: the tensor named like an input embedding (``embed_tokens.weight``,
            ``wte.weight``, ``word_embeddings.weight`` and so on), or the only table.
        vocab_size: rows, padding excluded. Megatron-style parts need it; otherwise it must match the table.
        with_padding: count padding rows of Megatron-style parts as rows; ``vocab_size`` may then be None.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: there is no such file or tensor, the choice is ambiguous, or a file is damaged or a pickle.

    Example:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> from shared.tables.find_table import open_table
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"wte.weight": np.eye(3), "wpe.weight": np.ones((8, 3))}, f"{folder}/model.safetensors")
        >>> table = open_table(folder)
        >>> table.tensor, table.vocab_size, table.emb_size
        ('wte.weight', 3, 3)
        >>> table.rows(1, 2)
        array([[0., 1., 0.]])
    """
    if tensor_name is not None and not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name must be a string or None, got {tensor_name!r}")
    if vocab_size is not None:
        vocab_size = check_size("vocab_size", vocab_size)
    try:
        return _open(path, tensor_name, vocab_size, with_padding)
    except OSError as error:
        raise ValueError(printable(f"{error.filename or path}: cannot be read ({error.strerror})")) from error
    except ValueError as error:  # its text may hold control characters from a file
        raise ValueError(printable(str(error))) from error


def _open(path: Paths, tensor_name: str | None, vocab_size: int | None, with_padding: bool) -> TableFile:
    found: Path | list[Path]
    if isinstance(path, (str, Path)):
        source = Path(path)
        found = _what_is_at(source)
    elif isinstance(path, (list, tuple)):
        found = [Path(part) for part in path]
        if not found:
            raise ValueError("path must name at least one file, got an empty list")
        source = found[0]
    else:
        raise TypeError(f"path must be a path or a list of paths, got {type(path).__name__}")
    if isinstance(found, list):
        return _megatron_parts(found, source, tensor_name, vocab_size, with_padding)
    if found.name.endswith(".json"):
        found, tensor_name = _in_index(found, tensor_name)
    tensor, place = _in_file(found, tensor_name)
    rows, columns = place.shape
    if vocab_size not in (None, rows):
        raise ValueError(f"vocab_size must be that of the table: asked for {vocab_size}, {path} has {rows}")
    return TableFile(tensor, str(place.dtype), rows, columns, found, [Segment(found, place.offset, 0, rows)])


def _what_is_at(path: Path) -> Path | list[Path]:
    """Resolve a path to an index, a safetensors file, or parts."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    for choices in ([path / "model.safetensors.index.json"], list(path.glob("*.safetensors.index.json"))):
        if len(choices) == 1 and choices[0].is_file():
            return choices[0]
    parts = sorted((int(found[1]), p) for p in path.iterdir() if p.is_dir() and (found := _PART.fullmatch(p.name)))
    if missing := sorted({*range(len(parts))} - {rank for rank, _ in parts}):
        raise ValueError(f"{path}: the part of rank {missing[0]} is missing; there are {len(parts)} parts")
    return [_only_file(part) for _, part in parts] or _only_file(path)


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if folder / "model.safetensors" in files:
        return folder / "model.safetensors"
    if files:
        raise ValueError(f"{folder}: name the file to use; there are {', '.join(file.name for file in files)}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    more = f"; pickle files ({', '.join(pickles)}) are never loaded: save the table as safetensors" if pickles else ""
    raise ValueError(f"{folder}: no safetensors file in it{more}")


def _in_index(path: Path, tensor_name: str | None) -> tuple[Path, str]:
    """Look up the tensor in an index; return its file and name."""
    check_file(path)
    if path.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large for an index")
    names = parse_object(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path}: not an index of a checkpoint, it has no weight_map of file names")
    tensor = _choose(path, tensor_name, names, names)
    file: str = names[tensor]
    parts = PurePosixPath(file).parts
    if not file or ".." in parts or PurePosixPath(file).is_absolute() or PureWindowsPath(file).anchor or "\\" in file:
        raise ValueError(f"{path}: the file of {tensor!r} must lie in the index's folder, got {file!r}")
    return path.parent / file, tensor


def _in_file(path: Path, tensor_name: str | None) -> tuple[str, TensorPlace]:
    """Look up the table in a file; return its name and place."""
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: a pickle file, which is never loaded; save the table as safetensors first")
    places = read_header(path)
    tensor = _choose(path, tensor_name, places, [name for name, place in places.items() if place.dtype])
    place = places[tensor]
    if place.dtype is None:
        raise ValueError(
            f"{path}: tensor {tensor!r} must be a 2-D table of {', '.join(STORAGE_CODES)}, "
            f"got {place.code} {list(place.shape)}"
        )
    return tensor, place


def _choose(path: Path, tensor_name: str | None, names: Collection[str], tables: Collection[str]) -> str:
    """Choose the named tensor, an input embedding, or the only table."""
    if tensor_name is not None:
        if tensor_name not in names:
            raise ValueError(f"{path}: no tensor {tensor_name!r} in it; there are: {_listed(names)}")
        return tensor_name
    possible = [name for name in tables if not _ANOTHER_TABLE.search(name)]
    looks_like = [name for name in possible if _INPUT_EMBEDDING.search(name)]
    chosen = looks_like or (possible if len(tables) == 1 else [])
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise ValueError(f"{path}: pass tensor_name; several look like an input embedding: {_listed(chosen)}")
    raise ValueError(f"{path}: pass tensor_name; none looks like an input embedding. Tensors in it: {_listed(tables)}")


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join([*names][:20]) + more or "none"


def _megatron_parts(
    paths: list[Path], source: Path, tensor_name: str | None, vocab_size: int | None, with_padding: bool
) -> TableFile:
    """Open equal parts in rank order; the last rows are padding."""
    found = [_in_file(path, tensor_name) for path in paths]
    tensor, first = found[0]
    for path, (name, place) in zip(paths, found, strict=True):
        if (name, place.code, place.shape) != (tensor, first.code, first.shape):
            raise ValueError(
                f"{path}: the parts must be equal, but this one has {name} {place.code} {list(place.shape)}, the first "
                f"{tensor} {first.code} {list(first.shape)}"
            )
    total = first.shape[0] * len(paths)
    if vocab_size is None and not with_padding:
        raise ValueError(
            f"vocab_size must be given for parts that may be padded: these {len(paths)} have {total} rows in all "
            f"and do not say where the vocabulary ends"
        )
    vocab_size = total if vocab_size is None else vocab_size
    if vocab_size > total:
        raise ValueError(f"vocab_size must be at most the {total} rows that the parts have, got {vocab_size}")
    partition = VocabPartition(vocab_size, len(paths), total)
    segments = [
        Segment(path, place.offset, *partition.owned_range(rank))
        for rank, (path, (_, place)) in enumerate(zip(paths, found, strict=True))
    ]
    return TableFile(tensor, str(first.dtype), vocab_size, first.shape[1], source, segments, partition)
