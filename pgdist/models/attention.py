"""Attention of queries over keys, computed in one of several ways that give the same.

"plain" forms all logits at once and is the fastest where they are few. "chunked" forms those of some queries at a
time, and again in the backward pass, so that memory grows with the length and not with its square. "splash" (TPU) and
"cudnn" (GPU) are kernels that keep logits on the chip; see `pgdist.models.flash_attention`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pgdist.models import flash_attention

# The published models' constant: finite, so that a row that sees nothing stays finite.
MASKED_LOGIT = -2.3819763e38
NEVER = 2**30  # the block of a key that nobody sees

_LONG = 1024  # tokens a row, from which on plain attention is not the fastest
_LOGITS_AT_ONCE = 2**25  # of a chunk: 128 MiB in float32


@flax.struct.dataclass
class Visibility:
    """Who sees whom: query q sees key k iff key_block[k] <= query_block[q].

    query_block: int32[B, T].  key_block: int32[B, S], NEVER for padding.  num_open: the first queries of each row that
    are of block 0, known without looking.  In each row the keys of block 0 stand before all others.  closed_mask:
    bool[B, T - num_open, S], of the other queries, where it was formed ahead for several layers.
    """

    query_block: jax.Array
    key_block: jax.Array
    num_open: int = flax.struct.field(pytree_node=False, default=0)
    closed_mask: jax.Array | None = None

    def prepared(self, implementation: str) -> Visibility:
        """The same, with what an implementation forms once for all layers."""
        if implementation == "chunked" or self.closed_mask is not None:
            return self
        num_open = self.num_open if implementation in PLATFORM_OF else 0
        mask = _mask(self.query_block[:, num_open:], self.key_block)
        return self.replace(num_open=num_open, closed_mask=mask)


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap); the logits themselves when cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility | None = None,
    *,
    logits_softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(query . key) @ value over the keys that each query sees: dtype[B, T, N, H].

    query: dtype[B, T, N, H], scaled already.  key, value: dtype[B, S, K, H]; N / K queries share a key.
    visibility: None where all see all.  logits_softcap: 0 for none.  implementation: a name of IMPLEMENTATIONS; "auto"
    is one that XLA may partition.  Logits and softmax are float32.
    """
    implementation = resolve(implementation, query.shape[1])
    if visibility is not None:
        visibility = visibility.prepared(implementation)
    return _IMPLEMENTATIONS[implementation](query, key, value, visibility, logits_softcap)


def attend_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, logits_softcap: float = 0.0
) -> jax.Array:
    """As `attend`, plainly, over keys and values of which each head is a row of its own, dtype[B * K, S, H].

    So they are read where they lie, by one product of two matrices for each such row.  mask: bool[B, T, S].
    """
    batch, length, heads, size = query.shape
    kv_heads = key.shape[0] // batch
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    query = query.transpose(0, 2, 3, 1, 4).reshape(key.shape[0], -1, size)
    logits = jnp.einsum("rqh,rsh->rqs", query, key, preferred_element_type=jnp.float32)
    logits = softcap(logits, logits_softcap).reshape(batch, heads, length, -1)
    logits = jnp.where(mask[:, None], logits, MASKED_LOGIT)
    probs = jax.nn.softmax(logits, axis=-1).astype(query.dtype).reshape(key.shape[0], query.shape[1], -1)
    attended = jnp.einsum("rqs,rsh->rqh", probs, value)
    attended = attended.reshape(batch, kv_heads, heads // kv_heads, length, size)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def resolve(implementation: str, length: int) -> str:
    """What "auto" stands for at `length` queries, of those that XLA may partition; others stand for themselves."""
    if implementation != "auto":
        return implementation
    return "plain" if length < _LONG else "chunked"


def choose(
    device: jax.Device, *, length: int, head_dim: int, dtype: DTypeLike, logits_softcap: float = 0.0
) -> str:
    """The name of the fastest implementation for self-attention over rows of `length` tokens.

    device: one of those that compute it.  Kernels are not partitioned by XLA: they are for code inside `jax.shard_map`,
    or for one device.
    """
    if length < _LONG:
        return "plain"
    task = {"head_dim": head_dim, "dtype": dtype, "logits_softcap": logits_softcap}
    kernels = (name for name in PLATFORM_OF if why_not(name, device, **task) is None)
    return next(kernels, "chunked")


def why_not(
    implementation: str, device: jax.Device, *, head_dim: int, dtype: DTypeLike, logits_softcap: float
) -> str | None:
    """What keeps the device from computing attention in this way; None where nothing does."""
    platform = PLATFORM_OF.get(implementation)
    if platform is None:
        return None
    if device.platform != platform:
        return f"it is a kernel for {platform} devices, these are {device.platform}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"it is a kernel for bfloat16 and float16, this is {jnp.dtype(dtype)}"
    if implementation == "cudnn":
        if logits_softcap:
            return "cuDNN has no soft-cap of attention logits, which this preset has"
        if head_dim > 128:
            return f"cuDNN's heads have at most 128 features, these have {head_dim}"
        if not re.fullmatch(r"([89]|\d\d+)\.\d+", getattr(device, "compute_capability", "")):
            return "cuDNN's attention needs an NVIDIA GPU of compute capability 8.0 or more"
    return None


def _mask(query_block: jax.Array, key_block: jax.Array) -> jax.Array:
    """int32[B, T], int32[B, S] -> bool[B, T, S]."""
    return key_block[:, None, :] <= query_block[:, :, None]


def _plain(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility | None, cap: float
) -> jax.Array:
    return _masked(query, key, value, None if visibility is None else visibility.closed_mask, cap)


def _masked(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, cap: float
) -> jax.Array:
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    logits = softcap(logits, cap)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :, :], logits, MASKED_LOGIT)
    probs = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    attended = jnp.einsum("bkgts,bskh->btkgh", probs, value)
    return attended.reshape(batch, length, heads, size)


def _chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility | None, cap: float
) -> jax.Array:
    batch, length, heads, _ = query.shape
    if visibility is None:
        visibility = Visibility(
            query_block=jnp.zeros((batch, length), jnp.int32),
            key_block=jnp.zeros((batch, key.shape[1]), jnp.int32),
        )
    chunks = min(length, -(-batch * heads * length * key.shape[1] // _LOGITS_AT_ONCE))
    size = -(-length // chunks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _masked(chunk[0], key, value, _mask(chunk[1], visibility.key_block), cap)

    attended = jax.lax.map(attend_chunk, (split(query), split(visibility.query_block)))
    return attended.swapaxes(0, 1).reshape(batch, chunks * size, *query.shape[2:])[:, :length]


def _with_kernel(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Open queries see a part of the keys that is one for all of them, which a kernel can do; the few others are
    attended plainly.
    """

    def attend_by_kernel(
        query: jax.Array, key: jax.Array, value: jax.Array, visibility: Visibility | None, cap: float
    ) -> jax.Array:
        if visibility is None:
            return kernel(query, key, value, None, cap)
        count = visibility.num_open
        is_seen = visibility.key_block <= 0
        attended = [kernel(query[:, :count], key, value, is_seen, cap)] if count else []
        if count < query.shape[1]:
            attended.append(_masked(query[:, count:], key, value, visibility.closed_mask, cap))
        return jnp.concatenate(attended, axis=1)

    return attend_by_kernel


_IMPLEMENTATIONS: Mapping[str, Callable[..., jax.Array]] = {
    "plain": _plain,
    "chunked": _chunked,
    "splash": _with_kernel(flash_attention.splash),
    "cudnn": _with_kernel(flash_attention.cudnn),
}
IMPLEMENTATIONS = tuple(_IMPLEMENTATIONS)
PLATFORM_OF = {"splash": "tpu", "cudnn": "gpu"}  # that a kernel is for
