"""Dtypes of tables, and floating-point arrays as bits."""

import ml_dtypes
import numpy as np

__all__ = [
    "DTYPES",
    "STORED_DTYPES",
    "canonical_nan",
    "cast",
    "dtype_named",
    "ordered_integers",
    "row_hashes",
    "ulp_distance",
    "unsigned_view",
]

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
"""Dtypes of a layer's table, by name."""

STORED_DTYPES = {
    **DTYPES,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Dtypes of a table in a file, by name; a layer reads float8 only with a cast."""


def dtype_named(name: str) -> np.dtype:
    """Dtype of a name in ``DTYPES``."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to ``dtype`` once; return ``values`` itself if it has that dtype.

    Values out of range become infinity, or NaN where the dtype has no infinity.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float64 and dtype.itemsize < 4 and dtype != np.float16:
            values = _rounded_to_odd(values)  # ml_dtypes casts through float32 and would round twice
        return values.astype(dtype)


def _rounded_to_odd(values: np.ndarray) -> np.ndarray:
    """Cast float64 to float32, rounding to odd.

    Rounding the result again gives the bits of a single rounding. Source: Boldo and Melquiond, Emulation of a FMA and
    correctly rounded sums (2008).
    """
    nearest = np.ascontiguousarray(values.astype(np.float32))
    back, bits = nearest.astype(np.float64), nearest.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)
    bits |= back != values
    return nearest


def unsigned_view(values: np.ndarray) -> np.ndarray:
    """View as unsigned integers, to compare bits."""
    return values.view(f"u{values.dtype.itemsize}")


def canonical_nan(values: np.ndarray) -> np.ndarray:
    """Replace every NaN by the same one: arithmetic leaves payloads unspecified."""
    nan = np.isnan(values)
    return np.where(nan, np.array(np.nan, values.dtype), values) if nan.any() else values


def ordered_integers(values: np.ndarray) -> np.ndarray:
    """Map floats to int64 in order: neighbours one apart, both zeros 0.

    Example:
        >>> import numpy as np
        >>> from shared.bits import ordered_integers
        >>> ordered_integers(np.array([-0.0, 0.0, 1.0, np.nextafter(1.0, 2.0)]))[2:] - 0x3FF0000000000000
        array([0, 1])
    """
    bits = values.dtype.itemsize * 8
    magnitude = (unsigned_view(values) & np.array(2 ** (bits - 1) - 1, f"u{bits // 8}")).astype(np.int64)
    return np.where(np.signbit(values), -magnitude, magnitude)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in representable values; NaN where either side is NaN.

    The result is float64, exact below 2**53.

    Example:
        >>> import numpy as np
        >>> from shared.bits import ulp_distance
        >>> ulp_distance(np.array([1.0, 0.0]), np.array([np.nextafter(1.0, 2.0), -0.0]))
        array([1., 0.])
    """
    left, right = ordered_integers(a), ordered_integers(b)
    # The difference of opposite signs may overflow int64: add the magnitudes as floats instead.
    same_sign = (left < 0) == (right < 0)
    distance = np.where(same_sign, np.abs(left - right * same_sign), 0).astype(np.float64)
    distance = np.where(same_sign, distance, np.abs(left.astype(np.float64)) + np.abs(right.astype(np.float64)))
    return np.where(np.isnan(a) | np.isnan(b), np.nan, distance)


def row_hashes(values: np.ndarray) -> np.ndarray:
    """Hash each row's bits to uint64; not cryptographic."""
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.shape[1] * values.dtype.itemsize)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))).view(np.uint64)
    multipliers = np.random.Philox(0).random_raw(rows.shape[1]) | np.uint64(1)
    mixed = (rows ^ (rows >> np.uint64(29))) @ multipliers
    return (mixed ^ (mixed >> np.uint64(32))).astype(np.uint64)
