"""PaliGemma: image tokens in front of text tokens, one decoder over both, prefix-LM attention.

The sequence is [N image tokens, T text tokens]. `mask_ar` (0 on image, prefix and separator, 1 on the
suffix) says what
may be seen: query q sees key k iff cumsum(mask_ar)[k] <= cumsum(mask_ar)[q] and k is not padding.
"""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pgdist.models.attention import NEVER, Visibility
from pgdist.models.gemma import Gemma, GemmaConfig, KVCache, SplitMlp, heads_as_rows
from pgdist.models.layer_weights import unstack
from pgdist.models.remat import LayerParams
from pgdist.models.siglip import Siglip, SiglipConfig

_TILE = 16  # rows of a tile of bfloat16 in TPU's memory
_NORM = re.compile(r".*/(LayerNorm_\d|\w*norm)/(scale|bias)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """The image tower and the decoder that it feeds."""

    image: SiglipConfig
    text: GemmaConfig


@flax.struct.dataclass
class DecodingState:
    """What decoding carries from token to token.

    kv: of each layer [B * K, S, H].  visible: bool[B, S], slots that hold a real token.  position: int32[B], of the
    next token of each row.  slot: int32[], where the next token of every row is written.
    """

    kv: tuple[KVCache, ...]
    visible: jax.Array
    position: jax.Array
    slot: jax.Array


def normalize_image(image: jax.Array) -> jax.Array:
    """uint8[..., 3] in 0..255 -> float32 in -1..1."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def prefix_lm_visibility(mask_ar: jax.Array, input_mask: jax.Array, *, num_open: int = 0) -> Visibility:
    """Of int[B, T] and bool[B, T]; the first num_open tokens of each row are known to be no suffix."""
    block = jnp.cumsum(mask_ar, axis=1, dtype=jnp.int32)
    key_block = jnp.where(input_mask.astype(bool), block, NEVER)
    return Visibility(query_block=block, key_block=key_block, num_open=num_open)


def _sees_all(x: jax.Array, visible: jax.Array) -> Visibility:
    """All queries of x [B, T, D] see what is visible, bool[B, S]."""
    return Visibility(
        query_block=jnp.zeros(x.shape[:2], jnp.int32),
        key_block=jnp.where(visible, 0, NEVER),
        num_open=x.shape[1],
    )


class PaliGemma(nn.Module):
    """The joined model. `__call__` scores text; `prefill` and `extend` decode it."""

    config: PaliGemmaConfig
    image_layer_params: LayerParams | None = None
    text_layer_params: LayerParams | None = None
    split_mlp: SplitMlp | None = None

    def setup(self) -> None:
        self.img = Siglip(self.config.image, self.image_layer_params)
        self.llm = Gemma(self.config.text, self.text_layer_params, self.split_mlp)

    def __call__(
        self, image: jax.Array, text: jax.Array, mask_ar: jax.Array, input_mask: jax.Array | None = None
    ) -> jax.Array:
        """float[B, S, S, 3] in -1..1, int[B, T], int[B, T], bool[B, T] -> float32[B, T, V] logits.

        Logits at text position t score the token at t + 1.  input_mask: 0 on padding; None means no padding.
        """
        return self.llm.logits(self.hidden(image, text, mask_ar, input_mask))

    def hidden(
        self, image: jax.Array, text: jax.Array, mask_ar: jax.Array, input_mask: jax.Array | None = None
    ) -> jax.Array:
        """As `__call__`, but the final norm's outputs dtype[B, T, D] at the text positions."""
        if input_mask is None:
            input_mask = jnp.ones(text.shape, bool)
        return self.hidden_of_embedded(image, self.llm.embed(text), mask_ar, input_mask)

    def hidden_of_embedded(
        self, image: jax.Array, embedded: jax.Array, mask_ar: jax.Array, input_mask: jax.Array
    ) -> jax.Array:
        """As `hidden`, of text that is embedded already, dtype[B, T, D]; the embedding itself is not used."""
        image_tokens = self.img(image)
        n, length = image_tokens.shape[1], embedded.shape[1]
        # Rows of whole tiles: TPU's compiler reshapes and stores others by copying them. Short ones are not worth it.
        padding = -(n + length) % _TILE if n + length >= 16 * _TILE else 0
        embedded = jnp.pad(embedded, ((0, 0), (0, padding), (0, 0)))
        x = jnp.concatenate([image_tokens.astype(self.config.text.dtype), embedded], axis=1)
        input_mask = jnp.pad(input_mask.astype(bool), ((0, 0), (0, padding)))
        input_mask = jnp.pad(input_mask, ((0, 0), (n, 0)), constant_values=True)
        mask_ar = jnp.pad(mask_ar, ((0, 0), (n, padding)))
        hidden, _ = self.llm(
            x,
            positions=jnp.cumsum(input_mask, axis=1) - 1,
            visibility=prefix_lm_visibility(mask_ar, input_mask, num_open=n),
        )
        return hidden[:, n : n + length]

    def prefill(
        self, image: jax.Array, prompt: jax.Array, input_mask: jax.Array, *, max_new_tokens: int
    ) -> tuple[jax.Array, DecodingState]:
        """Reads image and prompt; returns the logits of the first new token, float32[B, V], and room for the
        rest.

        prompt: int[B, P], right-padded.  input_mask: bool[B, P].  The cache has S = N + P + max_new_tokens
        slots.
        """
        last, state = self.prefill_embedded(
            image, self.llm.embed(prompt), input_mask, max_new_tokens=max_new_tokens
        )
        return self.llm.logits(last), state

    def prefill_embedded(
        self, image: jax.Array, embedded: jax.Array, input_mask: jax.Array, *, max_new_tokens: int
    ) -> tuple[jax.Array, DecodingState]:
        """As `prefill`, of a prompt dtype[B, P, D] that is embedded already; returns instead of logits what they are
        formed of, dtype[B, D].
        """
        image_tokens = self.img(image)
        n = image_tokens.shape[1]
        x = jnp.concatenate([image_tokens.astype(self.config.text.dtype), embedded], axis=1)
        visible = jnp.pad(input_mask.astype(bool), ((0, 0), (n, 0)), constant_values=True)
        positions = jnp.cumsum(visible, axis=1) - 1
        hidden, kv = self.llm(x, positions=positions, visibility=_sees_all(x, visible))
        count = jnp.sum(visible, axis=1, dtype=jnp.int32)
        # Rows are right-padded: the last real token, not the last slot, predicts the first new one.
        last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)[:, 0]
        room = ((0, 0), (0, max_new_tokens), (0, 0))
        state = DecodingState(
            kv=jax.tree.map(lambda a: jnp.pad(heads_as_rows(a), room), unstack(kv)),
            visible=jnp.pad(visible, ((0, 0), (0, max_new_tokens))),
            position=count,
            slot=jnp.asarray(x.shape[1], jnp.int32),
        )
        return last, state

    def extend(self, token: jax.Array, state: DecodingState) -> tuple[jax.Array, DecodingState]:
        """Reads one token of each row, int[B]; returns the next one's logits, float32[B, V], and the new
        state.
        """
        hidden, state = self.extend_embedded(self.llm.embed(token[:, None]), state)
        return self.llm.logits(hidden), state

    def extend_embedded(self, x: jax.Array, state: DecodingState) -> tuple[jax.Array, DecodingState]:
        """As `extend`, of a token dtype[B, 1, D] that is embedded already; returns instead of logits what they are
        formed of, dtype[B, D].
        """
        visible = state.visible.at[:, state.slot].set(True)
        hidden, kv = self.llm.extend(
            x,
            state.kv,
            positions=state.position[:, None],
            visibility=_sees_all(x, visible),
            slot=state.slot,
        )
        state = DecodingState(kv=kv, visible=visible, position=state.position + 1, slot=state.slot + 1)
        return hidden[:, 0], state


def compute_dtype(config: PaliGemmaConfig, name: str) -> jnp.dtype | None:
    """What the model casts a parameter to before it uses it: its tower's dtype; None for norms, which stay
    exact.
    """
    if _NORM.fullmatch(name):
        return None
    return jnp.dtype(config.image.dtype if name.startswith("img/") else config.text.dtype)


def parameter_shapes(config: PaliGemmaConfig) -> dict:
    """The nested parameter tree as jax.ShapeDtypeStruct (float32), by shape evaluation alone."""
    size = config.image.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(PaliGemma(config).init, jax.random.key(0), image, text, text)["params"]
