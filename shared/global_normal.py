"""Normally distributed rows, bit-identical on every machine.

NumPy's log, sin and cos differ in the last bit between processors. They are polynomials here, built from operations that
IEEE 754 defines exactly: ``+ - * /`` and the square root, never fused.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from shared.bits import DTYPES, cast
from shared.checks import SEED_LIMIT, as_int, check_size

__all__ = ["normal_rows"]

_TAG = 0x70766520  # upper half of the Philox key, so that streams differ from plain Philox streams of the same seed
_PAIRS = 65536  # per block; with smaller ones threads wait for the interpreter (25 against 45 million numbers a second)

# Taylor coefficients, correctly rounded. Against mpmath, over thousands of arguments, log is off by at most 1.5 ulp, sine
# and cosine by at most 1.6: far below the rounding to float32.
_LOG = [float(Fraction(2, 2 * k + 1)) for k in range(12)]  # of 2 atanh(s) / s, in powers of s**2
_SIN = [float(Fraction((-1) ** k, math.factorial(2 * k + 1))) for k in range(10)]
_COS = [float(Fraction((-1) ** k, math.factorial(2 * k))) for k in range(10)]
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # its products with exponents are exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_HALF_PI = float.fromhex("0x1.921fb54442d18p+0")


def normal_rows(
    start: int,
    stop: int,
    emb_size: int,
    dtype: np.dtype,
    seed: int,
    mean: float = 0.0,
    std: float = 1.0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Normally distributed rows ``[start, stop)``; row i depends on ``(seed, i)`` only.

    Each row has its own Philox counter. Box-Muller in float64 turns two words into two numbers. ``mean + std * number`` is
    rounded once, to ``dtype``: float16, bfloat16, float32 or float64. Work is spread over the available CPUs, in blocks of
    bounded memory. A row's numbers depend on ``emb_size`` too. ``seed`` lies in ``[-2**63, 2**63)``.

    Returns:
        ``[stop - start, emb_size]`` in ``dtype``: ``out``, if given, which must be C-contiguous.

    Raises:
        TypeError: a size, row number or seed is not an integer.
        ValueError: an argument is out of range, or ``out`` has another shape, dtype or layout.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011); Box and Muller (1958).

    Example:
        >>> import numpy as np
        >>> from shared.global_normal import normal_rows
        >>> table = normal_rows(0, 100, 8, np.dtype(np.float32), seed=42)
        >>> bool((normal_rows(60, 70, 8, np.dtype(np.float32), seed=42) == table[60:70]).all())
        True
    """
    start, stop, emb_size = as_int("start", start), as_int("stop", stop), check_size("emb_size", emb_size)
    seed, dtype = as_int("seed", seed), np.dtype(dtype)
    if not 0 <= start <= stop:
        raise ValueError(f"start and stop must be rows in order, from 0 on, got {start} and {stop}")
    if not -SEED_LIMIT <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be in [-2**63, 2**63), got {seed}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if out is None:
        out = np.empty((stop - start, emb_size), dtype)
    if out.shape != (stop - start, emb_size) or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be C-contiguous {[stop - start, emb_size]} of {dtype}, got {list(out.shape)} of {out.dtype}"
        )
    # A row wider than a block is cut into several.
    words = -(-emb_size // 4) * 4
    columns = min(words, 2 * _PAIRS)
    rows = max(1, 2 * _PAIRS // words)
    blocks = [
        (row, min(row + rows, stop), column, min(column + columns, words))
        for row in range(start, stop, rows)
        for column in range(0, words, columns)
    ]

    def fill(block: tuple[int, int, int, int]) -> None:
        first, last, left, right = block
        bits = np.random.Philox(key=(_TAG << 64) + seed % 2**64, counter=(first * words + left) // 4)  # four words each
        raw = bits.random_raw((last - first) * (right - left)).reshape(last - first, right - left)
        numbers = _standard_normal(raw) * std + mean
        right = min(right, emb_size)
        out[first - start : last - start, left:right] = cast(numbers[:, : right - left], dtype)

    try:
        with ThreadPoolExecutor(min(len(blocks), len(os.sched_getaffinity(0))) or 1) as pool:
            for _ in pool.map(fill, blocks):
                pass
    except RuntimeError:  # at interpreter shutdown no thread can be started
        for block in blocks:
            fill(block)
    return out


def _standard_normal(words: np.ndarray) -> np.ndarray:
    """Box-Muller: two words to two float64 numbers."""
    first, second = np.ascontiguousarray(words[:, 0::2]), np.ascontiguousarray(words[:, 1::2])
    radius = np.sqrt(_log((first >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-53) * -2.0)  # log of (0, 1]
    cosine, sine = _cos_sin(second)
    numbers = np.empty(words.shape)
    np.multiply(radius, cosine, out=numbers[:, 0::2])
    np.multiply(radius, sine, out=numbers[:, 1::2])
    return numbers


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal numbers; overwrites ``x``."""
    bits = x.view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    bits -= exponent << 52  # x is now in [sqrt(1/2), sqrt(2))
    scale = exponent.astype(np.float64)
    s = (x - 1.0) / (x + 1.0)
    square = s * s
    series = _polynomial(_LOG[1:], square) * square * s
    return series + scale * _LN2_LOW + s * _LOG[0] + scale * _LN2_HIGH


def _cos_sin(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of ``word / 2**64`` turns."""
    # Nearest quarter turn, and the rest in [-1/8, 1/8) of a turn.
    quarter = ((words >> np.uint64(61)) + np.uint64(1)) >> np.uint64(1)
    rest = (words - (quarter << np.uint64(62))).view(np.int64) >> 9
    angle = rest.astype(np.float64) * (2.0**-53 * _HALF_PI)
    square = angle * angle
    sine = _polynomial(_SIN[1:], square) * square * angle + angle
    cosine = _polynomial(_COS[2:], square) * square * square + square * -0.5 + 1.0
    swapped = (quarter & np.uint64(1)).astype(bool)
    turned = np.where(swapped, sine, cosine), np.where(swapped, cosine, sine)
    for values, half_turns in zip(turned, (quarter + np.uint64(1), quarter), strict=True):
        values.view(np.uint64)[...] ^= (half_turns >> np.uint64(1) & np.uint64(1)) << np.uint64(63)  # flips the sign
    return turned


def _polynomial(coefficients: list[float], x: np.ndarray) -> np.ndarray:
    """Evaluate ``c[0] + c[1]*x + c[2]*x**2 + ...`` by Horner's rule."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total += coefficient
        total *= x
    total += coefficients[0]
    return total
