"""The objective written out, as nobody would train it: one device, float32, all logits of all positions at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pgdist.models import PaliGemma, PaliGemmaConfig
from pgdist.models.paligemma import normalize_image


def plain_loss(
    config: PaliGemmaConfig,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    max_scored_positions: int = 0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The mean over unmasked rows of the mean over their scored tokens, float32[] in nats."""
    logits = PaliGemma(config).apply(
        {"params": params},
        normalize_image(batch["image"]),
        batch["text"][:, :-1],
        batch["mask_ar"][:, :-1],
        batch["mask_input"][:, :-1],
    )
    log_probabilities = jax.nn.log_softmax(logits)  # [B, T, V]
    words = logits.shape[-1]
    wanted = jax.nn.one_hot(batch["text"][:, 1:], words)
    wanted = (1 - label_smoothing) * wanted + label_smoothing / (words - 1) * (1 - wanted)
    token_losses = -jnp.sum(wanted * log_probabilities, axis=-1)
    scored = batch["mask_loss"][:, 1:]
    if max_scored_positions:
        scored = scored * (jnp.cumsum(scored, axis=1) <= max_scored_positions)
    row_losses = jnp.sum(token_losses * scored, axis=1) / jnp.maximum(1, jnp.sum(scored, axis=1))
    weight = batch["weight"]
    return jnp.sum(row_losses * weight) / jnp.maximum(1.0, jnp.sum(weight))
