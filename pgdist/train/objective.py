"""The training objective: the mean over examples of the mean negative log-likelihood of each example's
suffix.

Vocabulary logits are formed for a block of positions at a time and formed again in the backward pass, so
they never exist for a whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.models.gemma import vocabulary_logits
from pgdist.models.paligemma import PaliGemma, normalize_image

# Floats of vocabulary logits that one device may hold at a time: 256 MiB, beside several GiB of weights.
_LOGITS_PER_DEVICE = 1 << 26


@flax.struct.dataclass
class BatchLoss:
    """Sums over a global batch, float32[]. The mean loss is loss / examples."""

    loss: jax.Array
    examples: jax.Array
    tokens: jax.Array
    correct_tokens: jax.Array


def token_losses(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    *,
    block: int,
    final_logits_softcap: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(Negative log-likelihood of each target in nats, whether it is the likeliest token), float32[B, S]
    each.

    hidden: dtype[B, S, D], final-norm outputs.  embedding: [V, D].  targets: int[B, S].
    block: positions of each row whose logits exist at a time: memory is B*block*V, not B*S*V.
    With label smoothing e the target weighs 1-e and each other token e/(V-1).
    """
    vocabulary = embedding.shape[0]
    length = targets.shape[1]
    blocks = -(-length // block)
    padding = blocks * block - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], blocks, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(hidden_block: jax.Array, target_block: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = vocabulary_logits(hidden_block, embedding, final_logits_softcap)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        target_logit = jnp.take_along_axis(logits, target_block[..., None], axis=-1)[..., 0]
        loss = normalizer - target_logit
        if label_smoothing:
            other = label_smoothing / (vocabulary - 1)
            all_losses = vocabulary * normalizer - jnp.sum(logits, axis=-1)
            loss = (1.0 - label_smoothing - other) * loss + other * all_losses
        correct = target_logit >= jnp.max(logits, axis=-1)
        return loss, correct.astype(jnp.float32)

    _, scored = jax.lax.scan(lambda _, xs: (None, score(*xs)), None, (split(hidden), split(targets)))
    losses, correct = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length], scored)
    return losses, correct


def batch_loss(
    model: PaliGemma,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    num_devices: int,
    max_scored_positions: int = 0,
    label_smoothing: float = 0.0,
) -> BatchLoss:
    """Sums of the loss over the rows with weight 1 of a batch of rows (see `pgdist.data`), under a mesh or
    none.

    max_scored_positions: at most so many suffix tokens a row are scored (0: all), the first ones.
    """
    text = batch["text"]
    hidden = model.apply(
        {"params": params},
        normalize_image(batch["image"]),
        text[:, :-1],
        batch["mask_ar"][:, :-1],
        batch["mask_input"][:, :-1],
        method=PaliGemma.hidden,
    )
    targets, scored = text[:, 1:], batch["mask_loss"][:, 1:]
    if 0 < max_scored_positions < targets.shape[1]:
        positions = jnp.argsort(scored == 0, axis=1, stable=True)[:, :max_scored_positions]
        hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        targets, scored = (jnp.take_along_axis(x, positions, axis=1) for x in (targets, scored))
    embedding = params["llm"]["embedder"]["input_embedding"]
    losses, correct = token_losses(
        hidden,
        embedding,
        targets,
        block=_block_size(targets.shape, embedding.shape[0], num_devices),
        final_logits_softcap=model.config.text.final_logits_softcap,
        label_smoothing=label_smoothing,
    )
    scored, weight = scored.astype(jnp.float32), batch["weight"]
    example_loss = jnp.sum(losses * scored, axis=1) / jnp.maximum(1.0, jnp.sum(scored, axis=1))
    return BatchLoss(
        loss=jnp.sum(example_loss * weight),
        examples=jnp.sum(weight),
        tokens=jnp.sum(scored * weight[:, None]),
        correct_tokens=jnp.sum(correct * scored * weight[:, None]),
    )


def _block_size(scored_shape: tuple[int, int], vocabulary: int, num_devices: int) -> int:
    rows, positions = scored_shape
    rows_per_device = -(-rows // num_devices)
    return max(1, min(positions, _LOGITS_PER_DEVICE // (rows_per_device * vocabulary)))
