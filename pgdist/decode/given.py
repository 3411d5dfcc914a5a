"""Given answers in the place of a search: decoding that chooses what it is told, to know how likely that is."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.decode.logits import Logits
from pgdist.decode.sampling import Sequences, write_column

NOTHING = -1  # where an answer has no token


@flax.struct.dataclass
class Read:
    """Answers as far as they were read.  left: int32[B], tokens until the longest of an example's answers ends.
    logprobs: see `Sequences`.
    """

    left: jax.Array
    logprobs: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenAnswers:
    """Like `pgdist.decode.sampling.Sampler`, of sequences that are known.

    tokens: int32[B, C, M], each answer with its end-of-sequence token, then NOTHING; NOTHING alone where an example
    has fewer than C answers.
    """

    tokens: jax.Array

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def max_new_tokens(self) -> int:
        return self.tokens.shape[2]

    def start(self, example: jax.Array, is_real: jax.Array, seed: jax.Array) -> Read:
        """int32[B], bool[B], uint32[] -> nothing read yet; nothing to read of examples that are not real."""
        longest = jnp.max(jnp.sum(self.tokens != NOTHING, axis=2, dtype=jnp.int32), axis=1)
        return Read(left=jnp.where(is_real, longest, 0), logprobs=jnp.zeros(self.tokens.shape, jnp.float32))

    def is_active(self, read: Read) -> jax.Array:
        """bool[B]: which examples have an answer that goes on."""
        return read.left > 0

    def choose(self, step: jax.Array, logits: Logits, read: Read) -> tuple[jax.Array, None, Read]:
        """int32[], logits of B * C rows -> (int32[B, C], the answers' tokens number `step`; None, for each goes on by
        itself; the answers, read so far).
        """
        given = jax.lax.dynamic_index_in_dim(self.tokens, step, axis=2, keepdims=False)
        token = jnp.maximum(given, 0)
        logprob = logits.log_probability(token.reshape(-1)).reshape(token.shape)
        logprob = jnp.where(given == NOTHING, 0.0, logprob)
        return token, None, Read(left=read.left - 1, logprobs=write_column(read.logprobs, logprob, step))

    def results(self, read: Read) -> Sequences:
        """In the order in which they were given."""
        is_answer = self.tokens[:, :, 0] != NOTHING
        scores = jnp.where(is_answer, jnp.sum(read.logprobs, axis=-1), -jnp.inf)
        return Sequences(tokens=self.tokens, logprobs=read.logprobs, scores=scores)
