"""Attention kernels, JAX's own, which never write logits to memory: all queries of a row see the same keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

# What a kernel leaves for its backward pass, a name for policies: little, and dear to compute again.
ATTENDED = "attended"

_LANES = 128  # lengths of blocks are multiples of it
# Tokens, of two-byte floats. A block of queries meets a block of keys in vector memory, of which a v5e has enough for
# these. In the backward pass each block of keys writes gradients of all queries: the fewer there are, the better.
_LARGEST_QUERY_BLOCK, _LARGEST_KEY_BLOCK = 1024, 1536


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, is_seen: jax.Array | None, cap: float
) -> jax.Array:
    """On TPU: query [B, T, N, H], key and value [B, S, K, H], is_seen bool[B, S] or None for all -> [B, T, N, H]."""
    batch, length, heads, _ = query.shape
    num_keys = key.shape[1]
    query, key, value = (_in_lanes(x).swapaxes(1, 2) for x in (query, key, value))
    mask = splash_mask.FullMask((query.shape[2], key.shape[2]))
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(query.shape[2], key.shape[2], has_softcap=bool(cap)),
        attn_logits_soft_cap=cap or None,
        residual_checkpoint_name=ATTENDED,
        head_shards=1,
        q_seq_shards=1,
    )
    segments = None
    if is_seen is not None or num_keys != key.shape[2]:
        # Queries attend to keys of their own segment, which is 0.
        is_seen = jnp.ones((batch, num_keys), bool) if is_seen is None else is_seen
        hidden = _in_lanes(~is_seen, fill=True)
        segments = splash_kernel.SegmentIds(
            q=jnp.zeros((batch, query.shape[2]), jnp.int32), kv=hidden.astype(jnp.int32)
        )
    attended = jax.vmap(kernel)(query, key, value, segments)
    return attended.swapaxes(1, 2)[:, :length]


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, is_seen: jax.Array | None, cap: float
) -> jax.Array:
    """On GPU: as `splash`, for two-byte floats; the keys that are seen come first.  ValueError for a soft-cap."""
    if cap:
        raise ValueError("cuDNN's attention has no soft-cap of logits")
    count = None if is_seen is None else jnp.sum(is_seen, axis=1, dtype=jnp.int32)
    attended = jax.nn.dot_product_attention(
        query, key, value, scale=1.0, key_value_seq_lengths=count, implementation="cudnn"
    )
    return checkpoint_name(attended, ATTENDED)


def _in_lanes(x: jax.Array, fill: bool = False) -> jax.Array:
    """x with axis 1 padded to a multiple of the lanes."""
    padding = -x.shape[1] % _LANES
    return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)


def _block_sizes(queries: int, keys: int, *, has_softcap: bool) -> splash_kernel.BlockSizes:
    # Capped logits are kept beside those that are not.
    block_q = _block(queries, _LARGEST_QUERY_BLOCK // (2 if has_softcap else 1))
    block_kv = _block(keys, _LARGEST_KEY_BLOCK)
    return splash_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        use_fused_bwd_kernel=True,  # one pass for the gradients of queries, keys and values
    )


def _block(length: int, largest: int) -> int:
    """The largest multiple of the lanes that divides the length and is no larger than the largest block."""
    return max(size for size in range(_LANES, min(length, largest) + 1, _LANES) if length % size == 0)
