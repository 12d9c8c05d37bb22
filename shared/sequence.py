"""Chunks of the sequence dimension, one per rank."""

from collections.abc import Sequence

import numpy as np

from shared.partition import VocabPartition

__all__ = ["chunk_shape", "resolve_seq_dim", "rows_needed"]


def resolve_seq_dim(ndim: int, seq_dim: int) -> int:
    """Convert ``seq_dim``, which may count from the end, to ``[0, ndim)``.

    Raises:
        ValueError: the ids have no such dimension.
    """
    if not -ndim <= seq_dim < ndim:
        raise ValueError(
            f"seq_dim must name a dimension of the ids, in [{-ndim}, {ndim}), got seq_dim={seq_dim} with ids of {ndim} "
            f"dimensions; splitting over ranks needs a sequence"
        )
    return seq_dim % ndim


def chunk_shape(shape: Sequence[int], seq_dim: int, world_size: int) -> tuple[int, ...]:
    """Shape of one rank's chunk of the ids.

    Raises:
        ValueError: the ids have no such dimension, or its length is not divisible by ``world_size``.

    Example:
        >>> from shared.sequence import chunk_shape
        >>> chunk_shape((4, 2048), seq_dim=-1, world_size=8)
        (4, 256)
    """
    dim = resolve_seq_dim(len(shape), seq_dim)
    length, over = shape[dim] // world_size, shape[dim] % world_size  # divmod does not take a traced size
    if over:
        raise ValueError(
            f"the sequence must be divisible by world_size: ids of shape {tuple(shape)} have {shape[dim]} positions "
            f"along dimension {dim}, which leaves {over} over with world_size={world_size}; "
            f"pad the sequence to {(length + 1) * world_size}, or choose another seq_dim"
        )
    return (*shape[:dim], length, *shape[dim + 1 :])


def rows_needed(ids: np.ndarray, partition: VocabPartition, seq_dim: int = -1) -> np.ndarray:
    """Count the distinct rows that each rank's chunk needs from each owner.

    Returns:
        int64 ``[world_size, world_size]``: entry ``[o, d]`` counts the distinct rows of owner o in the chunk of rank d.

    Example:
        >>> import numpy as np
        >>> from shared import VocabPartition
        >>> from shared.sequence import rows_needed
        >>> rows_needed(np.array([0, 0, 3, 1, 3, -1]), VocabPartition(4, 2))
        array([[1, 1],
               [1, 1]])
    """
    world_size = partition.world_size
    chunk_shape(ids.shape, seq_dim, world_size)
    counts = np.zeros((world_size, world_size), np.int64)
    for destination, chunk in enumerate(np.split(ids, world_size, axis=seq_dim)):
        owners = partition.owner(np.unique(chunk))
        counts[:, destination] = np.bincount(owners[owners >= 0], minlength=world_size)
    return counts
