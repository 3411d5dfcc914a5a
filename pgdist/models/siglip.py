"""The SigLIP image encoder: patches -> pre-norm transformer -> linear connector into the decoder's width.

Names and shapes of parameters are the published checkpoint's: the blocks are one scanned block whose arrays
have the layer on axis 0. There is no pooling: each patch becomes one image token. Norms and softmax run in
float32, everything else in `dtype`, whatever the dtype of the parameters.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pgdist.models.attention import attend
from pgdist.models.remat import LayerParams, rematerialize


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of the image tower. image_size, patch_size: pixels; output_dim: the decoder's width D."""

    image_size: int
    output_dim: int
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"

    @property
    def num_tokens(self) -> int:
        """Image tokens N: one a patch."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, written as one matrix product over flattened patches."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, N, W]."""
        c = self.config
        p, grid = c.patch_size, c.image_size // c.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, 3, c.width))
        bias = self.param("bias", nn.initializers.zeros, (c.width,))
        # A "VALID" convolution leaves pixels out beyond the last whole patch.
        image = image[:, : grid * p, : grid * p, :].astype(c.dtype)
        patches = image.reshape(-1, grid, p, grid, p, 3).swapaxes(2, 3).reshape(-1, grid * grid, p * p * 3)
        return patches @ kernel.reshape(p * p * 3, c.width).astype(c.dtype) + bias.astype(c.dtype)


class SelfAttention(nn.Module):
    """Full self-attention with biases."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, W] -> [B, N, W]."""
        c = self.config
        head_dim = c.width // c.num_heads
        init = nn.initializers.xavier_uniform()

        def project(name: str) -> jax.Array:
            return nn.DenseGeneral((c.num_heads, head_dim), dtype=c.dtype, kernel_init=init, name=name)(x)

        query, key, value = project("query") * head_dim**-0.5, project("key"), project("value")
        attended = attend(query, key, value, implementation=c.attention)
        return nn.DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype, kernel_init=init, name="out")(attended)


class Mlp(nn.Module):
    """Two dense layers with a tanh-GELU between."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, W] -> [B, N, W]."""
        c = self.config
        init = nn.initializers.xavier_uniform()
        shape = x.shape
        # One [B*N, W] matrix: XLA's CPU backend multiplies it faster than a batch of small ones.
        x = nn.Dense(c.mlp_dim, dtype=c.dtype, kernel_init=init, name="Dense_0")(x.reshape(-1, shape[-1]))
        x = nn.Dense(c.width, dtype=c.dtype, kernel_init=init, name="Dense_1")(nn.gelu(x, approximate=True))
        return x.reshape(shape)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """[B, N, W] -> ([B, N, W], None): the carry and the (absent) per-layer output of a scan."""
        c = self.config
        y = nn.LayerNorm(dtype=c.dtype, name="LayerNorm_0")(x)
        x = x + SelfAttention(c, name="MultiHeadDotProductAttention_0")(y)
        y = nn.LayerNorm(dtype=c.dtype, name="LayerNorm_1")(x)
        return x + Mlp(c, name="MlpBlock_0")(y), None


class Encoder(nn.Module):
    """`depth` blocks, scanned, and a final norm."""

    config: SiglipConfig
    layer_params: LayerParams | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, W] -> [B, N, W]."""
        c = self.config
        blocks = nn.scan(
            rematerialize(EncoderBlock, c.remat, self.layer_params),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.depth,
        )
        x, _ = blocks(c, name="encoderblock")(x)
        return nn.LayerNorm(dtype=c.dtype, name="encoder_norm")(x)


class Siglip(nn.Module):
    """Image -> image tokens in the decoder's width."""

    config: SiglipConfig
    layer_params: LayerParams | None = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """float[B, S, S, 3] in -1..1 -> dtype[B, N, D], N = (S / patch)^2."""
        c = self.config
        x = PatchEmbedding(c, name="embedding")(image)
        position = self.param(
            "pos_embedding", nn.initializers.normal(c.width**-0.5), (1, c.num_tokens, c.width)
        )
        x = Encoder(c, self.layer_params, name="Transformer")(x + position.astype(c.dtype))
        # Zero at the start, as published: an untrained connector adds nothing to the decoder.
        return nn.Dense(c.output_dim, dtype=c.dtype, kernel_init=nn.initializers.zeros, name="head")(x)
