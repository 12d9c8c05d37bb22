"""What goes wrong between processes: ones that do not agree about what they compute."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from shared.agreement import describe_ids, disagreement

__all__ = ["check_agreement", "gather_objects"]


def check_agreement(ids: Any, facts: dict[str, Any]) -> None:
    """Compare what all processes are about to compute.

    Args:
        ids: this process's ids, traced or not.
        facts: what else must be equal in all processes, as plain values by name.

    Raises:
        ValueError: in every process, naming the first thing they disagree about and who has what.
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
    """What every process passed, of what JSON can hold, in every process."""
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = _gather(np.array([len(text)], np.int32))
    rows = _gather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths.reshape(-1), strict=True)]


def _gather(row: np.ndarray) -> np.ndarray:
    """Every process's row."""
    # In a thread of its own: what is being traced and the mesh that is set are this thread's, and JAX refuses there.
    with ThreadPoolExecutor(1) as thread:
        rows = np.asarray(thread.submit(multihost_utils.process_allgather, row).result())
    return rows.reshape(jax.process_count(), -1)
