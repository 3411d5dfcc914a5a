"""The weights of the decoder's layers, out of their stacks and as they are multiplied when each row has one token.

A product with few rows takes as long as its weights take to read. Compilers read a whole array, contracted along the
axis that suits the product, where it lies; a part of one, or another order, they may copy first, in a loop over tokens
for each of them. So arrays of their own are formed, once, before the loop, and from them the model's shapes, which the
compilers see through. That takes the layers' memory again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def unstack(layers: PyTree) -> tuple[PyTree, ...]:
    """A tree of arrays [L, ...] -> for each layer one of arrays [...]."""
    depth = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda stack, i=i: stack[i], layers) for i in range(depth))


def lay_out(layer: Mapping) -> PyTree:
    """The parameters of a layer of `pgdist.models.gemma.Gemma`, the same ones, formed of arrays of their own."""
    attention, mlp = layer["attn"], layer["mlp"]
    query_ndh, key_value_ckdh = attention["q_einsum"]["w"], attention["kv_einsum"]["w"]
    query_dnh = _formed(query_ndh.swapaxes(0, 1))
    key_value_ckhd = _formed(key_value_ckdh.swapaxes(2, 3))
    gate, up = (_formed(matrix) for matrix in mlp["gating_einsum"])
    return {
        **layer,
        "attn": {
            "q_einsum": {"w": query_dnh.swapaxes(0, 1)},
            "kv_einsum": {"w": key_value_ckhd.swapaxes(2, 3)},
            "attn_vec_einsum": {"w": _formed(attention["attn_vec_einsum"]["w"])},
        },
        "mlp": {"gating_einsum": jnp.stack([gate, up]), "linear": _formed(mlp["linear"])},
    }


def _formed(array: jax.Array) -> jax.Array:
    """Not fused into what needs it: what does not change in a loop is then formed before it."""
    return jax.lax.optimization_barrier(array)
