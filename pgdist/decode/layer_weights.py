"""A decoder layer's weights in the order in which XLA's CPU backend multiplies by them.

Its products take whole arrays, contracted along the axis that they have room for: of others, and of parts of an array,
they are given a copy. In a loop over tokens these copies are made for each token, and take longer than the products.
So weights are arranged before the loop; in it the model's own shapes are formed again, which the compiler sees through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pgdist.models.gemma import unstack

PyTree = Any


def arrange_layers(stacked: PyTree) -> tuple[PyTree, ...]:
    """Arrays [L, ...] of all layers -> those of each, arranged, in memory of their own."""
    return jax.lax.optimization_barrier(tuple(_arrange(layer) for layer in unstack(stacked)))


def restore_layers(arranged: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """What `arrange_layers` has arranged -> what `unstack` would have given."""
    return tuple(_restore(layer) for layer in arranged)


def _arrange(layer: Mapping) -> PyTree:
    query_ndh, key_value_ckdh, gate_and_up = _rearranged(layer)
    return _with(layer, query_ndh.swapaxes(0, 1), key_value_ckdh.swapaxes(2, 3), tuple(gate_and_up))


def _restore(layer: Mapping) -> PyTree:
    query_dnh, key_value_ckhd, gate_and_up = _rearranged(layer)
    return _with(layer, query_dnh.swapaxes(0, 1), key_value_ckhd.swapaxes(2, 3), jnp.stack(gate_and_up))


def _rearranged(layer: Mapping) -> tuple[Any, Any, Any]:
    """The weights that are not left as they are."""
    attention = layer["attn"]
    return attention["q_einsum"]["w"], attention["kv_einsum"]["w"], layer["mlp"]["gating_einsum"]


def _with(layer: Mapping, query: Any, key_value: Any, gating: Any) -> PyTree:
    attention = {**layer["attn"], "q_einsum": {"w": query}, "kv_einsum": {"w": key_value}}
    return {**layer, "attn": attention, "mlp": {**layer["mlp"], "gating_einsum": gating}}
