"""What goes wrong between processes: ones that do not agree about what they compute."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from shared.agreement import describe_ids, disagreement

__all__ = ["check_agreement"]

_LIMIT = 4096


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
    text = json.dumps(mine).encode()
    assert len(text) <= _LIMIT
    everyones = _gather(np.frombuffer(text.ljust(_LIMIT), np.uint8))
    found = disagreement([json.loads(bytes(row)) for row in everyones], "process", "processes")
    if found is not None:
        raise ValueError(found)


def _gather(row: np.ndarray) -> np.ndarray:
    """Every process's row."""
    # In a thread of its own: what is being traced and the mesh that is set are this thread's, and JAX refuses there.
    with ThreadPoolExecutor(1) as thread:
        return np.asarray(thread.submit(multihost_utils.process_allgather, row).result())
