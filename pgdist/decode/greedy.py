"""Greedy decoding of one batch: prefill, then one jitted loop over the KV cache.

The whole answer is one program, so no token crosses to the host before the last one is known. The loop ends
as soon as every real row has ended its answer; rows that have ended, and rows that are no examples (weight
0), emit padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pgdist.models.gemma import KVCache
from pgdist.models.paligemma import DecodingState, PaliGemma, normalize_image


@flax.struct.dataclass
class GreedyTokens:
    """What greedy decoding found.

    tokens: int32[B, M], each answer with its end-of-sequence token if it has one, then padding.
    steps: int32[], tokens decoded for the row that took longest; the model's `extend` ran steps - 1 times.
    """

    tokens: jax.Array
    steps: jax.Array


def greedy_decode(
    model: PaliGemma,
    params: Mapping,
    batch: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    eos_id: int | jax.Array,
    pad_id: int | jax.Array,
    batch_sharding: NamedSharding | None = None,
) -> GreedyTokens:
    """The most likely next token, again and again, up to `max_new_tokens` (M) of them.

    batch: image uint8[B, S, S, 3]; text int32[B, P], right-padded; mask_input int[B, P], 1 on real tokens;
    mask_ar int[B, P], 1 on a suffix, which is hidden: a batch made for scoring can be decoded as it is;
    weight float[B], 0 for rows that are no examples.  batch_sharding: how the rows of the cache are split;
    None leaves it to XLA.  Jit it with model, max_new_tokens and batch_sharding static.
    """
    variables = {"params": params}
    prompt_mask = (batch["mask_input"] > 0) & (batch["mask_ar"] == 0)
    logits, state = model.apply(
        variables,
        normalize_image(batch["image"]),
        batch["text"],
        prompt_mask,
        max_new_tokens=max_new_tokens - 1,  # the last new token is never read back, so it needs no slot
        method="prefill",
    )
    state = _split_by_row(state, batch_sharding)
    done = batch["weight"] <= 0
    tokens = jnp.full((done.shape[0], max_new_tokens), pad_id, jnp.int32)

    def emit(step, logits, done, tokens):
        """The rows' next tokens, also written into column `step`, and who has ended after them."""
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return token, done | (token == eos_id), tokens

    def unfinished(carry):
        step, _, done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def next_token(carry):
        step, token, done, tokens, state = carry
        logits, state = model.apply(variables, token, state, method="extend")
        token, done, tokens = emit(step, logits, done, tokens)
        return step + 1, token, done, tokens, _split_by_row(state, batch_sharding)

    steps = jnp.any(~done).astype(jnp.int32)  # 0 when no row is real: then the loop does not run either
    token, done, tokens = emit(0, logits, done, tokens)
    steps, _, _, tokens, _ = jax.lax.while_loop(unfinished, next_token, (steps, token, done, tokens, state))
    return GreedyTokens(tokens=tokens, steps=steps)


def _split_by_row(state: DecodingState, batch_sharding: NamedSharding | None) -> DecodingState:
    """Pins the cache's batch axis: a cache that XLA chose to replicate would cost memory and traffic."""
    if batch_sharding is None:
        return state
    rows = batch_sharding.spec[0]
    split = NamedSharding(batch_sharding.mesh, PartitionSpec(None, rows))
    kv = KVCache(
        key=jax.lax.with_sharding_constraint(state.kv.key, split),
        value=jax.lax.with_sharding_constraint(state.kv.value, split),
    )
    return state.replace(kv=kv)
