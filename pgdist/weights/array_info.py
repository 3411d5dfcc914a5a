"""What is known of a stored array before its data is read: what readers, layout and comparison talk about."""

from __future__ import annotations

import dataclasses
import math
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
