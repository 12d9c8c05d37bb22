"""Chunks of the sequence dimension, one per rank."""

from collections.abc import Sequence

__all__ = ["chunk_shape", "resolve_seq_dim"]


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
