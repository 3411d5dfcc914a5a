"""What is known of a stored array before its data is read: what readers, layout and comparison talk about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Shaped(Protocol):
    """Anything with a shape: jax.ShapeDtypeStruct, an array, ArrayInfo."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """Name, shape and dtype of one array; the dtype is that of its numbers (bfloat16 for a 2-byte void)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the numbers of all of them exactly."""
    different = set(dtypes)
    if len(different) == 1:
        return next(iter(different))
    try:
        return np.result_type(*different)
    except TypeError:  # float16 and bfloat16, which numpy does not put together
        return np.result_type(np.float32, *(dtype for dtype in different if dtype.itemsize > 2))
