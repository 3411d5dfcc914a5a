"""The training objective: the mean over examples of the mean negative log-likelihood of each example's
suffix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.models.paligemma import PaliGemma, normalize_image
from pgdist.train import vocabulary
from pgdist.train.vocabulary import Scoring

# Floats of vocabulary logits that one device may hold at a time: 256 MiB, beside several GiB of weights.
_LOGITS_PER_DEVICE = 1 << 26


@flax.struct.dataclass
class BatchLoss:
    """Sums over rows of a batch, float32[]. The mean loss is loss / examples."""

    loss: jax.Array
    examples: jax.Array
    tokens: jax.Array
    correct_tokens: jax.Array


def batch_loss(
    model: PaliGemma,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    max_scored_positions: int = 0,
    label_smoothing: float = 0.0,
    axis: str | None = None,
    trains_table: bool = True,
) -> BatchLoss:
    """Sums of the loss over the rows with weight 1 of a batch of rows (see `pgdist.data`).

    max_scored_positions: at most so many suffix tokens a row are scored (0: all), the first ones.
    axis: inside `jax.shard_map`, the mesh axis over which the rows of the embedding are split; the sums are then
    over this device's rows of the batch.  trains_table: whether the embedding gets a gradient.
    """
    text = batch["text"]
    table = params["llm"]["embedder"]["input_embedding"]
    hidden = model.apply(
        {"params": params},
        normalize_image(batch["image"]),
        vocabulary.embed(table, text[:, :-1], dtype=model.config.text.dtype, axis=axis),
        batch["mask_ar"][:, :-1],
        batch["mask_input"][:, :-1],
        method=PaliGemma.hidden_of_embedded,
    )
    targets, scored = text[:, 1:], batch["mask_loss"][:, 1:]
    if 0 < max_scored_positions < targets.shape[1]:
        positions = jnp.argsort(scored == 0, axis=1, stable=True)[:, :max_scored_positions]
        hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        targets, scored = (jnp.take_along_axis(x, positions, axis=1) for x in (targets, scored))
    scored, weight = scored.astype(jnp.float32), batch["weight"]
    token_weights = scored * weight[:, None] / jnp.maximum(1.0, jnp.sum(scored, axis=1, keepdims=True))
    how = Scoring(
        block=_block_size(targets.shape, model.config.text.vocab_size),
        softcap=model.config.text.final_logits_softcap,
        label_smoothing=label_smoothing,
        axis=axis,
        trains_table=trains_table,
    )
    loss, correct = vocabulary.weighted_loss(how, hidden, table, targets, token_weights)
    return BatchLoss(
        loss=loss,
        examples=jnp.sum(weight),
        tokens=jnp.sum(scored * weight[:, None]),
        correct_tokens=jnp.sum(correct * scored * weight[:, None]),
    )


def _block_size(scored_shape: tuple[int, int], vocab_size: int) -> int:
    """Of the rows of one device, or of all devices against their share of the vocabulary: as many logits."""
    rows, positions = scored_shape
    return max(1, min(positions, _LOGITS_PER_DEVICE // (rows * vocab_size)))
