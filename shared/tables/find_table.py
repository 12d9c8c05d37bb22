"""Search for a vocabulary table in safetensors files, checkpoints and Megatron-style parts."""

import re
from collections.abc import Iterable, Sequence
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
    if not isinstance(path, (str, Path, list, tuple)):
        raise TypeError(f"path must be a path or a list of paths, got {type(path).__name__}")
    found = _what_is_at(Path(path)) if isinstance(path, (str, Path)) else [Path(part) for part in path]
    if isinstance(found, list):
        source = Path(path) if isinstance(path, (str, Path)) else Path(*found[:1])
        return _megatron_parts(found, source, tensor_name, vocab_size, with_padding)
    if found.name.endswith(".json"):
        found, tensor_name = _in_index(found, tensor_name)
    tensor, place = _choose(found, tensor_name)
    rows, columns = place.shape
    if vocab_size not in (None, rows):
        raise ValueError(f"vocab_size must be that of the table: asked for {vocab_size}, {path} has {rows}")
    return TableFile(found, tensor, str(place.dtype), columns, [Segment(found, place.offset, 0, rows)])


def _what_is_at(path: Path) -> Path | list[Path]:
    """Resolve a path to an index, a safetensors file, or parts."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _no_pickle(path)
    for choices in ([path / "model.safetensors.index.json"], list(path.glob("*.safetensors.index.json"))):
        if len(choices) == 1 and choices[0].is_file():
            return choices[0]
    parts = sorted(p for p in path.iterdir() if p.is_dir() and _PART.fullmatch(p.name))
    if parts:
        return [_only_file(part) for part in _in_rank_order(parts)]
    return _only_file(path)


def _no_pickle(path: Path) -> Path:
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: a pickle file, which is never loaded; save the table as safetensors first")
    return path


def _in_rank_order(parts: list[Path]) -> list[Path]:
    ranks = {int(_PART.fullmatch(part.name)[1]): part for part in parts}  # type: ignore[index]
    missing = sorted(set(range(len(parts))) - set(ranks))
    if missing:
        raise ValueError(f"{parts[0].parent}: the part of rank {missing[0]} is missing; there are {len(parts)} parts")
    return [ranks[rank] for rank in range(len(parts))]


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
    if tensor_name is None:
        looks_like = [name for name in names if _INPUT_EMBEDDING.search(name) and not _ANOTHER_TABLE.search(name)]
        tensor_name = _the_one(looks_like, names, path)
    if tensor_name not in names:
        raise ValueError(f"{path}: no tensor {tensor_name!r} in it; there are: {_listed(names)}")
    file: str = names[tensor_name]
    parts = PurePosixPath(file).parts
    if not file or ".." in parts or PurePosixPath(file).is_absolute() or PureWindowsPath(file).anchor or "\\" in file:
        raise ValueError(f"{path}: the file of {tensor_name!r} must lie in the index's folder, got {file!r}")
    return _no_pickle(path.parent / file), tensor_name


def _choose(path: Path, tensor_name: str | None) -> tuple[str, TensorPlace]:
    places = read_header(path)
    if tensor_name is None:
        tables = [name for name, place in places.items() if place.is_table]
        possible = [name for name in tables if not _ANOTHER_TABLE.search(name)]
        looks_like = [name for name in possible if _INPUT_EMBEDDING.search(name)]
        tensor_name = _the_one(looks_like or (possible if len(tables) == 1 else []), tables, path)
    if tensor_name not in places:
        raise ValueError(f"{path}: no tensor {tensor_name!r} in it; there are: {_listed(places)}")
    place = places[tensor_name]
    if not place.is_table:
        raise ValueError(
            f"{path}: tensor {tensor_name!r} must be a 2-D table of {', '.join(STORAGE_CODES)}, "
            f"got {place.code} {list(place.shape)}"
        )
    return tensor_name, place


def _the_one(looks_like: list[str], candidates: Iterable[str], path: Path) -> str:
    if len(looks_like) == 1:
        return looks_like[0]
    if looks_like:
        raise ValueError(f"{path}: pass tensor_name; several look like an input embedding: {_listed(looks_like)}")
    raise ValueError(
        f"{path}: pass tensor_name; none looks like an input embedding. Tensors in it: {_listed(candidates)}"
    )


def _listed(candidates: Iterable[str]) -> str:
    names = list(candidates)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _megatron_parts(
    paths: list[Path], source: Path, tensor_name: str | None, vocab_size: int | None, with_padding: bool
) -> TableFile:
    """Open equal parts in rank order; the last rows are padding."""
    if not paths:
        raise ValueError("path must name at least one file, got an empty list")
    found = [_choose(_no_pickle(path), tensor_name) for path in paths]
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
    segments = []
    for rank, (path, (_, place)) in enumerate(zip(paths, found, strict=True)):
        start, stop = partition.owned_range(rank)
        if start < stop:
            segments.append(Segment(path, place.offset, start, stop))
    return TableFile(source, tensor, str(first.dtype), first.shape[1], segments, partition)
