"""Logits of the next token, of which a device may hold a part: all rows against its part of the vocabulary.

Whole, they are the largest array of a step, 8 MB where the rest of what a step moves is 20: so a search that asks
for the likeliest token alone is answered from each part's likeliest.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits:
    """Of B rows.  part: float32[B, V], or where `axis` of the mesh splits the vocabulary over n devices, float32[n * B,
    V / n] with the rows of all of them, one device's after the other's.
    """

    part: jax.Array
    axis: str | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.part.shape[-1] * (1 if self.axis is None else jax.lax.axis_size(self.axis))

    def repeat(self, times: int) -> Logits:
        """Each row so many times, side by side."""
        return dataclasses.replace(self, part=jnp.repeat(self.part, times, axis=0)) if times > 1 else self

    def whole(self) -> jax.Array:
        """float32[B, V]."""
        if self.axis is None:
            return self.part
        return jax.lax.all_to_all(self.part, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def likeliest(self, is_allowed: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The likeliest token of each row, int32[B], the first of equals, and its log-probability, float32[B], in nats.

        is_allowed: bool[V], which tokens may be chosen; None for all.
        """
        choosable, first, size = self.part, self._first, self.part.shape[-1]
        if is_allowed is not None:
            is_allowed = jax.lax.dynamic_slice_in_dim(is_allowed, first, size)
            choosable = jnp.where(is_allowed, self.part, -jnp.inf)
        logit = jnp.max(choosable, axis=-1)
        # Two maxima cost less than an argmax, on a CPU a tenth; float32 has 24 bits for the number of a token.
        falling = jnp.arange(size, 0, -1, dtype=jnp.float32)
        token = size - jnp.max(jnp.where(choosable == logit[:, None], falling, 1), axis=-1)
        return self._join(token + first, logit)

    def log_probability(self, token: jax.Array) -> jax.Array:
        """Of a token of each row, int32[B] -> float32[B] in nats."""
        if self.axis is not None:
            token = jax.lax.all_gather(token, self.axis, axis=0, tiled=True)
        index = token - self._first
        is_here = (index >= 0) & (index < self.part.shape[-1])
        logit = jnp.take_along_axis(self.part, jnp.where(is_here, index, 0)[:, None], axis=-1)[:, 0]
        return self._join(token, jnp.where(is_here, logit, -jnp.inf))[1]

    @property
    def _first(self) -> jax.Array | int:
        """The first token of the part."""
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * self.part.shape[-1]

    def _join(self, token: jax.Array, logit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Each row's token with the largest logit of those that the parts have found, and its log-probability."""
        normalizer = jax.nn.logsumexp(self.part, axis=-1)
        if self.axis is not None:
            found = jnp.stack([token.astype(jnp.float32), logit, normalizer], axis=-1)
            found = jax.lax.all_to_all(found[:, None], self.axis, split_axis=0, concat_axis=1, tiled=True)
            tokens, logits, normalizers = jnp.moveaxis(found, -1, 0)  # each [B, n]
            best = jnp.argmax(logits, axis=-1)[:, None]
            token, logit = (jnp.take_along_axis(x, best, axis=-1)[:, 0] for x in (tokens, logits))
            normalizer = jax.nn.logsumexp(normalizers, axis=-1)
        return token.astype(jnp.int32), logit - normalizer
