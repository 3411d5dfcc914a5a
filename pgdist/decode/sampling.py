"""How answers are chosen from the model's next-token distributions: what a user can ask for, and sampling itself.

What is random about an answer is keyed by (seed, example, candidate, position): the same seed gives the same answer on
any mesh, in any batch, from any number of processes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.decode.logits import Logits
from pgdist.errors import ConfigError

Method = Literal["greedy", "sample", "beam"]
_NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the answers to each example are chosen.

    method: "greedy" takes the likeliest token; "sample" draws from the distribution that temperature, top_k and top_p
    leave; "beam" searches for the likeliest sequences.  n: answers to return, best first.  candidates: sequences
    decoded for each example, of which the n best are returned: samples by log-probability (best-of-n), or beams by
    score; 0 is n.  temperature: divides the logits.  top_k: tokens that stay, 0 for all.  top_p: the likeliest tokens
    stay that together have this probability.  length_penalty: a beam's score is its log-probability divided by its
    length to this power.  allowed: ids of the only tokens that may be chosen, beside the end of the sequence; empty
    for all.  banned: ids that may not.  seed: of all that is random.
    """

    method: Method = "greedy"
    n: int = 1
    candidates: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 1.0
    allowed: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for what makes no sense."""
        if self.method not in get_args(Method):
            raise ConfigError(f"sampler {self.method!r}: expected one of {', '.join(get_args(Method))}.")
        if self.n < 1:
            raise ConfigError(f"n={self.n}: expected at least one answer.")
        if self.candidates and self.candidates < self.n:
            raise ConfigError(
                f"{self.candidates} candidates for n={self.n} answers: expected at least as many."
            )
        if self.method == "greedy" and self.width > 1:
            raise ConfigError(
                f"{self.width} answers of the greedy sampler would all be the same: choose sample or beam."
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature}: expected more than 0, and finite; for 0, choose greedy."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: expected a probability above 0 and at most 1.")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: expected a number of tokens, or 0 for all.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: expected 0 to 2**32 - 1.")
        if self.method != "sample" and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ConfigError(f"temperature, top_k and top_p are for the sampler sample, not {self.method}.")
        if self.method != "beam" and self.length_penalty != 1.0:
            raise ConfigError(f"length_penalty is for the sampler beam, not {self.method}.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty={self.length_penalty}: expected a finite number.")
        if (smallest := min((*self.allowed, *self.banned), default=0)) < 0:
            raise ConfigError(f"allowed or banned token id {smallest}: expected 0 or more.")
        if self.allowed and set(self.allowed) <= set(self.banned):
            raise ConfigError(f"All {len(self.allowed)} allowed tokens are banned too: no token is left.")

    @property
    def width(self) -> int:
        """Sequences decoded for each example."""
        return self.candidates or self.n


GREEDY = Sampling()


@flax.struct.dataclass
class Sequences:
    """Answers of B examples, C to each.

    tokens: int32[B, C, M], each with its end-of-sequence token if it has one, then padding.  logprobs: float32[B, C,
    M], each token's log-probability under the model in nats, 0 on padding.  scores: float32[B, C], what orders them:
    the sum of logprobs, for beams divided by the length penalty; -inf where there is no such answer.
    """

    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array


@flax.struct.dataclass
class Samples:
    """Sequences in the making.  example: int32[B], ids.  seed: uint32[B], the same for all.  done: bool[B, C].
    tokens, logprobs: see `Sequences`.
    """

    example: jax.Array
    seed: jax.Array
    done: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sequences that grow independently of each other, token by token.  Of `max_new_tokens` (M) at most."""

    how: Sampling
    max_new_tokens: int
    eos_id: int
    pad_id: int

    @property
    def width(self) -> int:
        return self.how.width

    def start(self, example: jax.Array, is_real: jax.Array, seed: jax.Array) -> Samples:
        """int32[B], bool[B], uint32[] -> no tokens yet; examples that are not real have ended already."""
        shape = (example.shape[0], self.width, self.max_new_tokens)
        return Samples(
            example=example,
            seed=jnp.full(example.shape, seed, jnp.uint32),
            done=jnp.broadcast_to(~is_real[:, None], shape[:2]),
            tokens=jnp.full(shape, self.pad_id, jnp.int32),
            logprobs=jnp.zeros(shape, jnp.float32),
        )

    def is_active(self, samples: Samples) -> jax.Array:
        """bool[B]: which examples need another token."""
        return ~jnp.all(samples.done, axis=1)

    def choose(self, step: jax.Array, logits: Logits, samples: Samples) -> tuple[jax.Array, None, Samples]:
        """int32[], logits of B * C rows -> (int32[B, C], tokens number `step`; None, for each goes on by itself; the
        samples with them).
        """
        if self.how.method == "greedy":
            found = logits.likeliest(allowed_tokens(self.how, logits.vocabulary, eos_id=self.eos_id))
            token, logprob = (x.reshape(samples.done.shape) for x in found)
        else:
            token, logprob = self._draw(step, logits.whole().reshape(*samples.done.shape, -1), samples)
        token = jnp.where(samples.done, self.pad_id, token)
        logprob = jnp.where(samples.done, 0.0, logprob)
        return (
            token,
            None,
            samples.replace(
                done=samples.done | (token == self.eos_id),
                tokens=write_column(samples.tokens, token, step),
                logprobs=write_column(samples.logprobs, logprob, step),
            ),
        )

    def _draw(self, step: jax.Array, logits: jax.Array, samples: Samples) -> tuple[jax.Array, jax.Array]:
        """float32[B, C, V] -> a token of each, int32[B, C], and its log-probability, float32[B, C]."""
        choosable = allow(self.how, logits, eos_id=self.eos_id)
        choosable = _truncate(self.how, choosable / self.how.temperature)
        choosable += _noise(samples, step, choosable.shape)
        token = jnp.argmax(choosable, axis=-1).astype(jnp.int32)
        logprob = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return token, logprob - jax.nn.logsumexp(logits, axis=-1)

    def results(self, samples: Samples) -> Sequences:
        """The n best of each example, best first."""
        scores, order = jax.lax.top_k(jnp.sum(samples.logprobs, axis=-1), self.how.n)
        return Sequences(
            tokens=jnp.take_along_axis(samples.tokens, order[..., None], axis=1),
            logprobs=jnp.take_along_axis(samples.logprobs, order[..., None], axis=1),
            scores=scores,
        )


def allow(how: Sampling, logits: jax.Array, *, eos_id: int) -> jax.Array:
    """float[..., V] -> the same, but -inf for tokens that may not be chosen."""
    is_allowed = allowed_tokens(how, logits.shape[-1], eos_id=eos_id)
    return logits if is_allowed is None else jnp.where(is_allowed, logits, _NEVER)


def allowed_tokens(how: Sampling, vocabulary: int, *, eos_id: int) -> jax.Array | None:
    """Which tokens may be chosen, bool[V]; None for all.  Raises ConfigError for ids that are no tokens."""
    if not (how.allowed or how.banned):
        return None
    if (largest := max((*how.allowed, *how.banned))) >= vocabulary:
        raise ConfigError(
            f"token id {largest} is allowed or banned, but the model's {vocabulary} tokens end with {vocabulary - 1}."
        )
    is_allowed = jnp.full(vocabulary, not how.allowed)
    if how.allowed:
        is_allowed = is_allowed.at[jnp.array((*how.allowed, eos_id))].set(True)
    return is_allowed.at[jnp.array(how.banned, jnp.int32)].set(False)


def write_column(rows: jax.Array, column: jax.Array, step: jax.Array) -> jax.Array:
    """[B, C, M] with [B, C] at `step`."""
    return jax.lax.dynamic_update_slice_in_dim(rows, column[..., None].astype(rows.dtype), step, axis=-1)


def _truncate(how: Sampling, logits: jax.Array) -> jax.Array:
    """-inf for what top_k leaves out, then for what top_p leaves out of the rest; float32[B, C, V]."""
    if 0 < how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, _NEVER, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        likelier = jnp.cumsum(probability, axis=-1) - probability  # than this one
        stay = jnp.sum(
            likelier < how.top_p, axis=-1, keepdims=True
        )  # at least the likeliest, to which it is 0
        least = jnp.take_along_axis(ordered, stay - 1, axis=-1)
        logits = jnp.where(logits < least, _NEVER, logits)
    return logits


def _noise(samples: Samples, step: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Gumbel noise float32[B, C, V]: the largest sum of logit and noise is a draw from the softmax."""
    _, width, vocabulary = shape

    def of_one(seed: jax.Array, example: jax.Array, candidate: jax.Array) -> jax.Array:
        # Named, not JAX's default: the same on every backend.
        key = jax.random.key(seed, impl="threefry2x32")
        for number in (example, candidate, step):
            key = jax.random.fold_in(key, number)
        return jax.random.gumbel(key, (vocabulary,), jnp.float32)

    of_candidates = jax.vmap(of_one, in_axes=(None, None, 0))
    of_examples = jax.vmap(of_candidates, in_axes=(0, 0, None))
    return of_examples(samples.seed, samples.example, jnp.arange(width))
