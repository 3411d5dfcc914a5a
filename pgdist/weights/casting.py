"""Casting a block of numbers, and finding the numbers that must not be there."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pgdist.errors import WeightsError

# By dtype: the integers of its size, and infinity as one of them; after the sign, what is not finite is that or more.
_BITS = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80),
}


def cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`block` in `dtype` (itself if it has it already); what is too large becomes infinite, silently."""
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype, copy=False)


def may_overflow(source: np.dtype, target: np.dtype) -> bool:
    """Whether a finite number of `source` can be infinite in `target`."""
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (source, target)):
        return False
    return float(ml_dtypes.finfo(source.newbyteorder("=")).max) > float(ml_dtypes.finfo(target).max)


def check_finite(result: np.ndarray, *, source: np.ndarray, name: str, path: object) -> None:
    """Raises WeightsError if `result`, the cast of `source`, holds a NaN or infinity, and says why."""
    if not jnp.issubdtype(result.dtype, jnp.inexact) or _all_finite(result):
        return
    check_range(result, source=source, name=name, path=path)
    raise WeightsError(
        f"{path}: array {name!r} holds NaN or infinity. The file comes from a run that diverged, "
        "or is damaged: use another one, or allow it with --config.init_allow_non_finite."
    )


def check_range(result: np.ndarray, *, source: np.ndarray, name: str, path: object) -> None:
    """Raises WeightsError if the cast of `source` to `result` made a finite number infinite."""
    if result.dtype == source.dtype or not jnp.issubdtype(result.dtype, jnp.inexact):
        return
    if _all_finite(result):
        return
    if np.count_nonzero(np.isfinite(result)) < np.count_nonzero(np.isfinite(source)):
        raise WeightsError(
            f"{path}: array {name!r} holds numbers that are too large for {result.dtype}, whose largest is "
            f"{float(ml_dtypes.finfo(result.dtype).max):.4g}. Use bfloat16 or float32 for it."
        )


def _all_finite(numbers: np.ndarray) -> bool:
    if numbers.dtype not in _BITS or not numbers.flags.c_contiguous or not numbers.size:
        return bool(np.isfinite(numbers).all())
    # The largest positive and the largest negative number by their bits: ten times as fast as numpy's isfinite.
    signed, unsigned, infinity = _BITS[numbers.dtype]
    bits = numbers.reshape(-1)
    sign = 1 << (8 * numbers.itemsize - 1)
    return bool(bits.view(signed).max() < infinity and bits.view(unsigned).max() < sign + infinity)
