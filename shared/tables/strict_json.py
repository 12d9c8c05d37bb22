"""JSON objects from files that may be damaged or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["load_object", "parse_object"]

_LARGEST = 100 << 20


def parse_object(text: bytes | str, source: str) -> dict[str, Any]:
    """Parse a JSON object; ``source`` names it in errors.

    Raises:
        ValueError: it is not a JSON object, repeats a key, or holds NaN or an infinity.

    Example:
        >>> from shared.tables.strict_json import parse_object
        >>> parse_object('{"rows": 3}', "an example")
        {'rows': 3}
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


def load_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 100 MiB."""
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large for an index")
    return parse_object(path.read_bytes(), str(path))
