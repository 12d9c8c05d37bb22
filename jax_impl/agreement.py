"""Comparison of ids and options across processes."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from shared.agreement import describe_ids, disagreement

__all__ = ["check_agreement", "gather_objects"]


def check_agreement(ids: object, facts: Mapping[str, object]) -> None:
    """Compare ids and further facts across all processes.

    Args:
        ids: this process's ids. Values are compared unless the ids are traced or split over devices.
        facts: values that must be equal in all processes, by name.

    Raises:
        ValueError: in every process; names the first fact that differs, and each process's value.
    """
    mine = {name: str(value) for name, value in facts.items()}
    if isinstance(ids, jax.core.Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_replicated):
        mine |= {"shape of the ids": str(ids.shape), "dtype of the ids": str(ids.dtype)}
    elif isinstance(ids, (jax.Array, np.ndarray)):
        mine |= describe_ids(np.asarray(ids))
    else:
        mine["type of the ids"] = type(ids).__name__
    found = disagreement(gather_objects(mine), "process", "processes")
    if found is not None:
        raise ValueError(found)


def gather_objects(mine: Any) -> list[Any]:
    """All-gather one JSON-serialisable object per process."""
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = _gather(np.array([len(text)], np.int32))
    rows = _gather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.reshape(-1), strict=True)]


def _gather(row: np.ndarray) -> np.ndarray:
    """All-gather a row per process."""
    # In another thread: JAX refuses to gather while this one traces or has a mesh set.
    with ThreadPoolExecutor(1) as thread:
        rows = np.asarray(thread.submit(multihost_utils.process_allgather, row).result())
    return rows.reshape(jax.process_count(), -1)
