"""Beam search: the likeliest sequences found by always going on with the K likeliest that have not ended.

It is transformers' search, token for token, with its defaults: 2K continuations are looked at, so that K go on even
where K end; an example is settled when its best open beam, were it to end now, would not beat the worst of K found.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.decode.logits import Logits
from pgdist.decode.sampling import Sampling, Sequences, allow, write_column

_NONE = -jnp.inf  # the score of what is no hypothesis


@flax.struct.dataclass
class Beams:
    """K open beams and the K best that have ended, of each of B examples.

    is_open: bool[B], whether an open beam could still be among the best.  open: their `scores` are sums of logprobs.
    ended: their `scores` are divided by the length penalty; _NONE where there is none yet.
    """

    is_open: jax.Array
    open: Sequences
    ended: Sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Like `pgdist.decode.sampling.Sampler`, but sequences replace each other."""

    how: Sampling
    max_new_tokens: int
    eos_id: int
    pad_id: int

    @property
    def width(self) -> int:
        return self.how.width

    def start(self, example: jax.Array, is_real: jax.Array, seed: jax.Array) -> Beams:
        """int32[B], bool[B] -> one empty beam; nothing is random.  Examples that are not real are settled."""
        shape = (example.shape[0], self.width, self.max_new_tokens)
        empty = Sequences(
            tokens=jnp.full(shape, self.pad_id, jnp.int32),
            logprobs=jnp.zeros(shape, jnp.float32),
            scores=jnp.full(shape[:2], _NONE, jnp.float32),
        )
        return Beams(is_open=is_real, open=empty.replace(scores=empty.scores.at[:, 0].set(0.0)), ended=empty)

    def is_active(self, beams: Beams) -> jax.Array:
        """bool[B]: which examples are not settled."""
        return beams.is_open

    def choose(self, step: jax.Array, logits: Logits, beams: Beams) -> tuple[jax.Array, jax.Array, Beams]:
        """int32[], logits of B * K rows -> (int32[B, K], the open beams' tokens number `step`; int32[B, K], which beam
        each goes on from; the beams with them).
        """
        whole = logits.whole().reshape(*beams.open.scores.shape, -1)
        logprobs = allow(self.how, jax.nn.log_softmax(whole, axis=-1), eos_id=self.eos_id)
        scores, token, logprob, parent = self._continuations(logprobs, beams.open.scores)
        continued = Sequences(
            tokens=write_column(_pick(beams.open.tokens, parent), token, step),
            logprobs=write_column(_pick(beams.open.logprobs, parent), logprob, step),
            scores=scores,
        )
        ends = (token == self.eos_id) | (step + 1 == self.max_new_tokens)
        length = (step + 1).astype(jnp.float32) ** self.how.length_penalty

        # Only the best K may end here: the others stand by in case those do.
        may_end = ends & (jnp.arange(2 * self.width) < self.width) & beams.is_open[:, None]
        ended = _best(
            _join(beams.ended, continued.replace(scores=jnp.where(may_end, scores / length, _NONE))),
            self.width,
        )
        open_scores, kept = jax.lax.top_k(jnp.where(ends, _NONE, scores), self.width)
        still_open = _take(continued, kept).replace(scores=open_scores)
        # Scores that are no numbers, as of a model that diverged, settle nothing: the limit makes answers of them.
        is_settled = open_scores[:, 0] / length <= ended.scores[:, -1]
        beams = Beams(is_open=beams.is_open & ~is_settled, open=still_open, ended=ended)
        return _pick(token, kept), _pick(parent, kept), beams

    def results(self, beams: Beams) -> Sequences:
        """The n best of each example, best first; those that were cut at the limit count as ended."""
        return _best(beams.ended, self.how.n)

    def _continuations(self, logprobs: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
        """float32[B, K, V], float32[B, K] of the open beams -> the best 2K continuations, best first: their scores,
        tokens, the tokens' logprobs, and which beam they continue, each [B, 2K].
        """
        many = min(2 * self.width, logprobs.shape[-1])
        # No more of one beam can be among the best of all.
        logprob, token = jax.lax.top_k(logprobs, many)
        total = logprob + scores[..., None]
        flat = (total.shape[0], -1)
        best, place = jax.lax.top_k(total.reshape(flat), 2 * self.width)
        return best, _pick(token.reshape(flat), place), _pick(logprob.reshape(flat), place), place // many


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
    """[B, K, ...] and int[B, J] -> [B, J, ...]."""
    return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)


def _take(sequences: Sequences, index: jax.Array) -> Sequences:
    return jax.tree.map(lambda array: _pick(array, index), sequences)


def _best(sequences: Sequences, count: int) -> Sequences:
    return _take(sequences, jax.lax.top_k(sequences.scores, count)[1])


def _join(first: Sequences, second: Sequences) -> Sequences:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
