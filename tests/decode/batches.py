"""Examples in batches for a decoder: unequal prompts, ids that are no row numbers, a last batch that is not full."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tests.decode.model import random_prompts
from tests.models.small import SMALL

NAME = "paligemma2"
EXAMPLES = 13
LENGTH = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    arrays: dict[str, np.ndarray]


@functools.cache
def examples() -> dict[str, np.ndarray]:
    prefixes = [1 + (5 * i) % (LENGTH - 1) for i in range(EXAMPLES)]
    arrays = random_prompts(SMALL[NAME], prefixes=prefixes, length=LENGTH)
    # Ids that are no row numbers, in an order that is theirs.
    return arrays | {"index": np.array([(7 * i) % EXAMPLES + 100 for i in range(EXAMPLES)], np.int64)}


def make_batches(
    arrays: dict[str, np.ndarray], *, batch_size: int, rows: np.ndarray | slice = slice(None)
) -> list[Batch]:
    """Full batches, the last one filled up with rows of weight 0 and index -1.  rows: those of this process."""
    filled = {
        name: np.concatenate([array, np.zeros((-len(array) % batch_size, *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }
    filled["index"][len(arrays["index"]) :] = -1
    return [
        Batch(arrays={name: array[start : start + batch_size][rows] for name, array in filled.items()})
        for start in range(0, len(filled["index"]), batch_size)
    ]
