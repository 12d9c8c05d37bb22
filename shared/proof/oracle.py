"""Oracle of the layer: lookup and gradient in plain NumPy."""

import numpy as np
import numpy.typing as npt

from shared.ids import widen
from shared.partition import VocabPartition

__all__ = ["accumulation_dtype", "partial_lookup", "weight_grad"]


def accumulation_dtype(dtype: npt.DTypeLike) -> np.dtype:
    """Dtype of gradient sums: float32 for 16-bit tables, else the table's own."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def partial_lookup(weight: np.ndarray, ids: np.ndarray, partition: VocabPartition, rank: int) -> np.ndarray:
    """Look up the ids that ``rank`` owns; others get +0.0.

    ``weight`` holds the rows of ``rank``, ``[n, e]``.

    Returns:
        The incomplete embedding ``Er``, ``[*ids.shape, e]``, in the dtype of ``weight``.

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
    rows, owned = partition.locate(ids, rank)
    output = np.zeros((*ids.shape, weight.shape[1]), weight.dtype)
    output[owned] = weight[rows[owned]]
    return output


def weight_grad(
    grad_output: np.ndarray, ids: np.ndarray, partition: VocabPartition, rank: int, padding_idx: int | None = None
) -> np.ndarray:
    """Gradient of a rank's rows: ``grad_output`` summed by id.

    Sums start from +0.0, run in row-major order in ``accumulation_dtype``, and are rounded once. ``grad_output`` is the
    gradient of ``Er`` or ``E``, ``[*ids.shape, e]``.

    Returns:
        ``[n, e]`` in the dtype of ``grad_output``; zero for ``padding_idx`` and for rows whose id does not occur.

    Example:
        >>> import numpy as np
        >>> from shared import VocabPartition
        >>> from shared.proof.oracle import weight_grad
        >>> weight_grad(np.ones((3, 1)), np.array([2, 0, 2]), VocabPartition(4, 2), rank=1)
        array([[2.],
               [0.]])
    """
    ids = widen(np.asarray(ids))
    rows, owned = partition.locate(ids, rank)
    if padding_idx is not None:
        owned = owned & (ids != padding_idx)
    sums = np.zeros((partition.rows_per_rank, grad_output.shape[-1]), accumulation_dtype(grad_output.dtype))
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf; sums out of the dtype's range
        np.add.at(sums, rows[owned], grad_output[owned].astype(sums.dtype))
        return sums.astype(grad_output.dtype)
