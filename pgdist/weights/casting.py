"""Casting a block of numbers, and finding the numbers that must not be there."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pgdist.errors import WeightsError


def cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`block` in `dtype` (itself if it has it already); what is too large becomes infinite, silently."""
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype, copy=False)


def check_finite(result: np.ndarray, *, source: np.ndarray, name: str, path: object) -> None:
    """Raises WeightsError if `result`, the cast of `source`, holds a NaN or infinity, and says why."""
    if not jnp.issubdtype(result.dtype, jnp.inexact) or np.isfinite(result).all():
        return
    check_range(result, source=source, name=name, path=path)
    raise WeightsError(
        f"{path}: array {name!r} holds NaN or infinity. The file comes from a run that diverged, "
        "or is damaged: use another one."
    )


def check_range(result: np.ndarray, *, source: np.ndarray, name: str, path: object) -> None:
    """Raises WeightsError if the cast of `source` to `result` made a finite number infinite."""
    if result.dtype == source.dtype or not jnp.issubdtype(result.dtype, jnp.inexact):
        return
    if np.count_nonzero(np.isfinite(result)) < np.count_nonzero(np.isfinite(source)):
        raise WeightsError(
            f"{path}: array {name!r} holds numbers that are too large for {result.dtype}, whose largest is "
            f"{float(ml_dtypes.finfo(result.dtype).max):.4g}. Use bfloat16 or float32 for it."
        )
