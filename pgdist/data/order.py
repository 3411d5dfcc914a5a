"""Which example stands where in training: a pure function of (seed, global row).

Row b of step s in a batch of B is global row s*B + b. Grain's shuffle computes a permutation's entries one
by one, with a new permutation each epoch, so no order is stored, nothing has to be restored on resume, and
the number of hosts or workers does not come into it.
"""

from __future__ import annotations

import grain
import numpy as np

from pgdist.errors import ConfigError, DataError

# Grain's index_shuffle works on 32-bit indices.
_MAX_EXAMPLES = 2**31 - 1


class ExampleOrder:
    """The endless, per-epoch shuffled sequence of example ids; O(1) memory, picklable."""

    def __init__(self, num_examples: int, seed: int) -> None:
        """Raises DataError for no examples and ConfigError for a seed outside [0, 2**32)."""
        if not 1 <= num_examples <= _MAX_EXAMPLES:
            raise DataError(f"expected 1 to {_MAX_EXAMPLES:,} examples, found {num_examples:,}")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed: expected 0 to 2**32 - 1, found {seed}")
        self.num_examples = num_examples
        self.seed = seed
        self._ids = grain.MapDataset.range(num_examples).seed(seed).shuffle().repeat()

    def example(self, global_row: int) -> int:
        """The example id, 0 to num_examples - 1, at a global row."""
        return int(self._ids[global_row])

    def ids(self, step: int, batch_size: int) -> np.ndarray:
        """The example ids of one step's global batch, int64[batch_size]."""
        first = step * batch_size
        return np.array([self.example(first + row) for row in range(batch_size)], np.int64)

    def choose(self, global_row: int, count: int) -> int:
        """One of 0 to count - 1, uniformly, drawn for this global row by the seed."""
        if count == 1:
            return 0
        return int(np.random.default_rng((self.seed, global_row)).integers(count))
