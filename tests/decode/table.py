"""A model that is a table: the next token's logits depend on the token before alone, so all can be counted by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pgdist.decode import Sampling, loop
from pgdist.decode.logits import Logits
from pgdist.decode.sampling import Sequences
from pgdist.models.gemma import KVCache
from pgdist.models.paligemma import DecodingState

PAD, EOS = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSteps:
    """`pgdist.decode.steps.Steps`; logits float32[V, V] by the token before, the last of the prompt at first."""

    logits: jax.Array

    def prefill(self, image, prompt, mask, *, max_new_tokens):
        rows = prompt.shape[0]
        nothing = jnp.zeros((rows, 1, 1))
        state = DecodingState(
            kv=(KVCache(key=nothing, value=nothing),),
            visible=mask,
            position=jnp.zeros(rows, jnp.int32),
            slot=jnp.int32(0),
        )
        return Logits(part=self.logits[prompt[:, 0]]), state

    def extend(self, token, state):
        return Logits(part=self.logits[token]), state

    def any(self, flags):
        return jnp.any(flags)


@functools.cache
def _program(search: loop.Search):
    def decode(logits, batch, seed):
        return loop.decode(TableSteps(logits=logits), search, batch, seed)

    return jax.jit(decode)


def decode_table(
    logits: np.ndarray, prompts: np.ndarray, sampling: Sampling, *, max_new_tokens: int
) -> tuple[Sequences, int]:
    """Answers to int[B] prompts of one token each, as numpy arrays, and the number of steps."""
    batch = {
        "image": np.zeros((len(prompts), 0), np.uint8),
        "text": np.asarray(prompts, np.int32)[:, None],
        "mask_input": np.ones((len(prompts), 1), np.int32),
        "mask_ar": np.zeros((len(prompts), 1), np.int32),
        "weight": np.ones(len(prompts), np.float32),
        "index": np.arange(len(prompts), dtype=np.int32),
    }
    search = loop.make_search(
        dataclasses.replace(sampling, seed=0), max_new_tokens=max_new_tokens, eos_id=EOS, pad_id=PAD
    )
    found, steps = _program(search)(np.float32(logits), batch, np.uint32(sampling.seed))
    return jax.tree.map(np.asarray, found), int(steps)


def table_logprobs(logits: np.ndarray, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of int[B, C, M] tokens: float64[B, C, M] in nats, 0 behind the end of the sequence."""
    before = np.concatenate([np.broadcast_to(prompts[:, None, None], tokens[..., :1].shape), tokens], axis=-1)
    logits = np.asarray(logits, np.float64)
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    has_ended = np.cumsum(before == EOS, axis=-1)[..., :-1] > 0
    return np.where(has_ended, 0.0, logprobs[before[..., :-1], tokens])


def random_table(*, vocabulary: int, seed: int) -> np.ndarray:
    """Logits whose best are no near ties, float32[V, V]."""
    return 1.5 * np.random.default_rng(seed).standard_normal((vocabulary, vocabulary)).astype(np.float32)
