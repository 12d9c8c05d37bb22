"""Generated tables, ids and gradients, bit-identical on every machine.

They come from raw Philox bits: streams of a library's distributions may change between versions.
"""

import math
from collections.abc import Iterator

import numpy as np

from shared.global_normal import normal_rows
from shared.partition import VocabPartition

__all__ = ["exact_gradient", "normal_chunks", "special_rows", "table_chunks", "zipf_ids"]

_ROWS = 4096


def table_chunks(vocab_size: int, emb_size: int, dtype: np.dtype, seed: int) -> Iterator[np.ndarray]:
    """Yield a generated table in chunks of rows.

    Values are multiples of 2**-15 in [-1, 1), rounded to ``dtype``. The ``special_rows`` hold NaN, infinities and -0.0. No
    number is subnormal: XLA flushes these when it adds on a CPU.
    """
    values = (np.arange(65536, dtype=np.uint16).view(np.int16) / 32768).astype(dtype)
    special = dict(zip(special_rows(vocab_size), (np.nan, np.inf, -np.inf, -0.0), strict=False))
    bits = np.random.Philox(seed)
    for start in range(0, vocab_size, _ROWS):
        count = min(_ROWS, vocab_size - start)
        raw = bits.random_raw(-(-count * emb_size // 4)).view(np.uint16)[: count * emb_size]
        chunk = values[raw].reshape(count, emb_size)
        for row, value in special.items():
            if start <= row < start + count:
                chunk[row - start] = value
        yield chunk


def normal_chunks(vocab_size: int, emb_size: int, dtype: np.dtype, seed: int) -> Iterator[np.ndarray]:
    """Yield a generated table in chunks of rows, for a head.

    Values are normally distributed with standard deviation ``emb_size ** -0.5``: hidden states of standard deviation 1 give
    logits of standard deviation 1. All are finite: NaN in a single row would make every logsumexp NaN.
    """
    for start in range(0, vocab_size, _ROWS):
        yield normal_rows(start, min(start + _ROWS, vocab_size), emb_size, dtype, seed, std=1 / math.sqrt(emb_size))


def special_rows(vocab_size: int) -> list[int]:
    """Rows with special values; none in a table below 64 rows."""
    middle = vocab_size // 2
    return list(range(middle, middle + 4)) if vocab_size >= 64 else []


def zipf_ids(shape: tuple[int, ...], partition: VocabPartition, seed: int) -> np.ndarray:
    """Generate int64 ids; id i has probability proportional to ``1/(i + 1)``.

    The first ids are fixed: both edges of every rank, the special rows, and ids outside the vocabulary. Some of the last
    would become valid if narrowed to 32 bits.
    """
    vocab_size = partition.vocab_size
    mass = np.cumsum(1 / np.arange(1, vocab_size + 1, dtype=np.float64))
    uniform = (np.random.Philox([seed, 1]).random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53
    ids = np.minimum(np.searchsorted(mass, uniform * mass[-1], side="right"), vocab_size - 1).astype(np.int64)
    edges = [edge for r in range(partition.world_size) for edge in (partition.start(r), partition.stop(r) - 1)]
    outside = [-1, vocab_size, -vocab_size, 2**31 + 5, 2**32, 2**32 + vocab_size - 1, 2**63 - 1, -(2**63)]
    outside = [i for i in outside if not 0 <= i < vocab_size]
    planted = np.array([*edges, *special_rows(vocab_size), *outside], np.int64)[: len(ids) // 2]
    ids[: len(planted)] = planted
    return ids.reshape(shape)


def exact_gradient(ids: np.ndarray, emb_size: int, dtype: np.dtype, seed: int) -> np.ndarray:
    """Generate a gradient ``[*ids.shape, e]`` whose sums are exact in any order.

    Its values are multiples of 1/128 in [-1, 1), or of a coarser step where one id is very frequent. Every partial sum is
    then exact in float32, so correct sums agree in every bit.
    """
    most = int(np.unique(ids, return_counts=True)[1].max(initial=1))
    steps = 2 ** max(0, min(7, 24 - (most - 1).bit_length()))
    values = (np.floor(np.arange(256, dtype=np.uint8).view(np.int8) / 128 * steps) / steps).astype(dtype)
    count = ids.size * emb_size
    raw = np.random.Philox([seed, 2]).random_raw(-(-count // 8)).view(np.uint8)[:count]
    return values[raw].reshape(*ids.shape, emb_size)
