"""The layer in plain NumPy: the oracle that both backends are held to, written to be read, not to be fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from shared.ids import widen
from shared.partition import VocabPartition

__all__ = ["accumulation_dtype", "partial_lookup", "sum_partials", "weight_grad"]


def accumulation_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype in which gradients are added up: float32 for 16-bit tables, the table's own otherwise."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def partial_lookup(weight: np.ndarray, ids: np.ndarray, partition: VocabPartition, rank: int) -> np.ndarray:
    """Look up the ids that ``rank`` owns; every other id gets a row of +0.0.

    Args:
        weight: the rank's own rows, ``[n, e]``.
        ids: any shape, any integer dtype; ids outside the vocabulary are owned by no rank.
        partition: who owns what.
        rank: whose rows ``weight`` holds.

    Returns:
        The incomplete embedding ``Er``, ``ids.shape + (e,)``, in the dtype of ``weight``.

    Example:
        >>> import numpy as np
        >>> from shared import VocabPartition
        >>> from shared.proof.oracle import partial_lookup
        >>> table = np.arange(8.0).reshape(4, 2)
        >>> halves = VocabPartition(4, 2)
        >>> partial_lookup(table[2:], np.array([0, 3, 2]), halves, rank=1)
        array([[0., 0.],
               [6., 7.],
               [4., 5.]])
    """
    ids = widen(np.asarray(ids))
    owned = np.asarray(partition.owns(ids, rank))
    output = np.zeros((*ids.shape, weight.shape[1]), weight.dtype)
    output[owned] = weight[partition.local_ids(ids[owned], rank)]
    return output


def sum_partials(partials: Iterable[np.ndarray]) -> np.ndarray:
    """Add the ranks' incomplete embeddings up, in rank order, to the full embedding ``E``.

    No two partials have a row in common, so nothing rounds; as in every sum, -0.0 + 0.0 gives +0.0.
    """
    total: np.ndarray | None = None
    with np.errstate(invalid="ignore"):  # signalling NaN
        for partial in partials:
            total = partial.copy() if total is None else total + partial
    if total is None:
        raise ValueError("sum_partials needs the partial embedding of at least one rank, got none")
    return total


def weight_grad(
    grad_output: np.ndarray, ids: np.ndarray, partition: VocabPartition, rank: int, padding_idx: int | None = None
) -> np.ndarray:
    """The gradient of a rank's rows: for each, the sum of ``grad_output`` over the positions that asked for it.

    Sums run over the positions in row-major order, from +0.0, in ``accumulation_dtype``, and are rounded once.

    Args:
        grad_output: the gradient of ``Er`` (or of ``E``, which is the same), ``ids.shape + (e,)``.
        ids: any shape, any integer dtype.
        partition: who owns what.
        rank: whose rows to sum for.
        padding_idx: a global id whose row gets no gradient, or None.

    Returns:
        ``[n, e]`` in the dtype of ``grad_output``; zero for rows that no id asked for.

    Example:
        >>> import numpy as np
        >>> from shared import VocabPartition
        >>> from shared.proof.oracle import weight_grad
        >>> weight_grad(np.ones((3, 1)), np.array([2, 0, 2]), VocabPartition(4, 2), rank=1)
        array([[2.],
               [0.]])
    """
    ids = widen(np.asarray(ids))
    owned = np.asarray(partition.owns(ids, rank))
    if padding_idx is not None:
        owned &= ids != padding_idx
    sums = np.zeros((partition.rows_per_rank, grad_output.shape[-1]), accumulation_dtype(grad_output.dtype))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs; sums too large for the dtype
        np.add.at(sums, partition.local_ids(ids[owned], rank), grad_output[owned].astype(sums.dtype))
        return sums.astype(grad_output.dtype)
