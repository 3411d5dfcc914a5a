"""Gradient accumulation: a batch computed in microbatches, one after the other, for the memory of one.

The microbatches are parts of one sum. Whoever calls this divides by what the whole batch has (its unmasked rows), so
masked rows may lie in any microbatch, and the result is that of the batch in one piece up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Batch = Mapping[str, jax.Array]


def sum_over_microbatches(
    function: Callable[[PyTree, Batch], tuple[PyTree, PyTree]], params: PyTree, batch: Batch, *, steps: int
) -> tuple[PyTree, PyTree]:
    """function(params, microbatch) -> (values, gradients of params), each added up over so many microbatches of equal
    size, gradients in float32.

    batch: {name: [B, ...]}; inside `jax.shard_map`, this device's rows.  B divides by steps.
    """
    if steps == 1:
        return function(params, batch)
    microbatches = {name: x.reshape(steps, -1, *x.shape[1:]) for name, x in batch.items()}

    def add(total: PyTree, microbatch: Batch) -> tuple[PyTree, PyTree]:
        values, gradients = function(params, microbatch)
        return jax.tree.map(jnp.add, total, gradients), values

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    gradients, values = jax.lax.scan(add, zeros, microbatches)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), values), gradients
