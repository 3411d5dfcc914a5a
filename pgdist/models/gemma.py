"""The Gemma 1 and Gemma 2 decoders: scanned blocks over embedded tokens, with an explicit KV cache.

One set of modules serves both generations: soft-caps, post-norms, head counts and query scale are fields.
Names and shapes of parameters are the published checkpoint's. The cache is no hidden variable: a block takes
the keys and values of earlier tokens and returns those of its own, and whoever decodes owns the arrays.
Norms, rotary angles, attention logits and softmax are float32; everything else runs in `dtype`, whatever the
dtype of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from pgdist.models.attention import Visibility, attend, attend_cached, resolve, softcap
from pgdist.models.layer_weights import lay_out, unstack
from pgdist.models.remat import LayerParams, rematerialize

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Sizes of the decoder. query_scale multiplies queries; a soft-cap of 0 is none."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    vocab_size: int = 257_152
    attn_logits_softcap: float = 0.0
    final_logits_softcap: float = 0.0
    post_norms: bool = False
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far: of a layer as decoding keeps them dtype[B * K, S, H], S slots for each row,
    whose heads lie side by side; as a block returns them without a cache [B, T, K, H].
    """

    key: jax.Array
    value: jax.Array

    def written(self, key: jax.Array, value: jax.Array, slot: jax.Array) -> KVCache:
        """With those of T more tokens, [B, T, K, H], from `slot` on."""

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            new = heads_as_rows(new).astype(cached.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=1)

        return KVCache(key=write(self.key, key), value=write(self.value, value))


def heads_as_rows(x: jax.Array) -> jax.Array:
    """[B, T, K, H] -> [B * K, T, H]."""
    batch, length, heads, size = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, length, size)


def rotate(x: jax.Array, positions: jax.Array, *, max_wavelength: float = 10_000.0) -> jax.Array:
    """Rotary position embedding of x [B, T, N, H] at int positions [B, T]; the first half of H turns with the
    second.
    """
    half = x.shape[-1] // 2
    timescale = max_wavelength ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], same dtype."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class Einsum(nn.Module):
    """One weight `w` and an einsum with it, the weight cast to the input's dtype."""

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @nn.compact
    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        batch_axes = tuple(sorted(set(range(len(self.shape))) - set(self.in_axes) - set(self.out_axes)))
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=self.in_axes, out_axis=self.out_axes, batch_axis=batch_axes
        )
        return jnp.einsum(equation, x, self.param("w", init, self.shape).astype(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention: N query heads share K key/value heads."""

    config: GemmaConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        visibility: Visibility,
        cache: KVCache | None,
        slot: jax.Array | None,
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D], positions int[B, T], visibility of T x S -> ([B, T, D], this layer's keys and values).

        Without a cache S = T. With one ([B * K, S, H]) the new keys and values are written from `slot` on.
        """
        c = self.config
        query = Einsum((c.num_heads, c.width, c.head_dim), (1,), (0, 2), name="q_einsum")("btd,ndh->btnh", x)
        key, value = Einsum((2, c.num_kv_heads, c.width, c.head_dim), (2,), (1, 3), name="kv_einsum")(
            "btd,ckdh->cbtkh", x
        )
        query = rotate(query, positions) * jnp.asarray(c.query_scale, x.dtype)
        key = rotate(key, positions)
        if cache is None:
            cache = KVCache(key=key, value=value)
            attended = attend(
                query,
                key,
                value,
                visibility,
                logits_softcap=c.attn_logits_softcap,
                implementation=c.attention,
            )
        else:
            cache = cache.written(key, value, slot)
            attended = attend_cached(
                query,
                cache.key.astype(x.dtype),
                cache.value.astype(x.dtype),
                visibility.closed_mask,
                logits_softcap=c.attn_logits_softcap,
            )
        out = Einsum((c.num_heads, c.head_dim, c.width), (0, 1), (2,), name="attn_vec_einsum")(
            "btnh,nhd->btd", attended
        )
        return out, cache


@jax.custom_vjp
def _with_gradient_formed(x: jax.Array) -> jax.Array:
    """x [M, N] as it is. Its gradient is formed once, row by row, before what needs it: TPU's compiler would form it
    again for each block of each product that it goes into, and in the order that suits one of them.
    """
    return x


def _form_gradient(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    row_by_row = with_layout_constraint(gradient, Layout(major_to_minor=(0, 1)))
    return (jax.lax.optimization_barrier(row_by_row),)


_with_gradient_formed.defvjp(lambda x: (x, None), _form_gradient)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitMlp:
    """For hidden units that are split over devices.  gather: rows [M, D] of one device -> those of all of them.
    scatter: a device's share of the results for all rows -> the sum of all shares, for its own rows.
    """

    gather: Callable[[jax.Array], jax.Array]
    scatter: Callable[[jax.Array], jax.Array]


class GatedMlp(nn.Module):
    """GeGLU: (gelu(x @ gate) * (x @ up)) @ linear, with tanh-GELU."""

    config: GemmaConfig
    split: SplitMlp | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        fan_in = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0
        )
        gating = self.param("gating_einsum", fan_in, (2, c.width, c.mlp_dim)).astype(x.dtype)
        linear = self.param("linear", nn.initializers.lecun_normal(), (c.mlp_dim, c.width)).astype(x.dtype)
        shape = x.shape
        # One [B*T, D] matrix: XLA's CPU backend multiplies it faster than a batch of small ones.
        x = x.reshape(-1, c.width)
        if self.split:
            # For few rows: one product, whose weights TPU's compiler fetches ahead as they lie.
            gate, up = jnp.einsum("md,cdf->cmf", self.split.gather(x), gating)
        else:
            gate, up = (_with_gradient_formed(x @ gating[i]) for i in (0, 1))
        y = (nn.gelu(gate, approximate=True) * up) @ linear
        return (self.split.scatter(y) if self.split else y).reshape(shape)


class Block(nn.Module):
    """Attention and MLP, each behind a norm (Gemma 2: between two) and beside a residual connection."""

    config: GemmaConfig
    split_mlp: SplitMlp | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: KVCache | None,
        positions: jax.Array,
        visibility: Visibility,
        slot: jax.Array | None,
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D] -> ([B, T, D], this layer's keys and values); see `Attention`."""
        c = self.config
        y = RMSNorm(name="pre_attention_norm")(x)
        y, cache = Attention(c, name="attn")(y, positions, visibility, cache, slot)
        if c.post_norms:
            y = RMSNorm(name="post_attention_norm")(y)
        x = x + y
        y = GatedMlp(c, self.split_mlp, name="mlp")(RMSNorm(name="pre_ffw_norm")(x))
        if c.post_norms:
            y = RMSNorm(name="post_ffw_norm")(y)
        return x + y, cache


class Embedder(nn.Module):
    """The table that embeds tokens and, transposed, scores the vocabulary."""

    config: GemmaConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        self.input_embedding = self.param("input_embedding", init, (c.vocab_size, c.width))

    def encode(self, tokens: jax.Array) -> jax.Array:
        """int[B, T] -> dtype[B, T, D], multiplied by sqrt(D)."""
        c = self.config
        return self.input_embedding[tokens].astype(c.dtype) * jnp.asarray(c.width**0.5, c.dtype)

    def decode(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32[..., V] logits, soft-capped where the config says so."""
        return vocabulary_logits(hidden, self.input_embedding, self.config.final_logits_softcap)


def vocabulary_logits(hidden: jax.Array, embedding: jax.Array, cap: float) -> jax.Array:
    """hidden [..., D] at the final norm's output, embedding [V, D] -> float32[..., V] logits."""
    logits = jnp.einsum(
        "...d,vd->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return softcap(logits, cap)


class Gemma(nn.Module):
    """Embedding, scanned blocks, final norm, tied vocabulary logits."""

    config: GemmaConfig
    layer_params: LayerParams | None = None
    split_mlp: SplitMlp | None = None

    def setup(self) -> None:
        c = self.config
        self.embedder = Embedder(c)
        self.layers = nn.scan(
            rematerialize(Block, c.remat, self.layer_params),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.depth,
        )(c, self.split_mlp)
        self.final_norm = RMSNorm()

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int[B, T] -> dtype[B, T, D]."""
        return self.embedder.encode(tokens)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        visibility: Visibility,
    ) -> tuple[jax.Array, KVCache]:
        """Embedded tokens [B, T, D] -> (final-norm outputs [B, T, D], keys and values of all layers [L, B, T, K, H]).

        positions: int[B, T].  visibility: of T to T.
        """
        visibility = visibility.prepared(resolve(self.config.attention, x.shape[1]))
        x, cache = self.layers(x.astype(self.config.dtype), None, positions, visibility, None)
        return self.final_norm(x), cache

    def extend(
        self,
        x: jax.Array,
        cache: Sequence[KVCache],
        *,
        positions: jax.Array,
        visibility: Visibility,
        slot: jax.Array,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """As `__call__`, of tokens that go on from those of each layer's cache, in which they are written from `slot`
        (int[]) on.  visibility: of S keys to T queries.

        Layer after layer is written out: a loop would copy the weights of each, and its cache, before reading them.
        """
        visibility = visibility.prepared(resolve(self.config.attention, x.shape[1]))
        layers = [lay_out(layer) for layer in unstack(self.variables["params"]["layers"])]
        block = Block(self.config, self.split_mlp, parent=None)
        x, extended = x.astype(self.config.dtype), []
        for params, cached in zip(layers, cache, strict=True):
            x, cached = block.apply({"params": params}, x, cached, positions, visibility, slot)
            extended.append(cached)
        return self.final_norm(x), tuple(extended)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32[..., V]."""
        return self.embedder.decode(hidden)
