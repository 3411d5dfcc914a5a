"""Decoding one batch: prefill, then a loop over the KV cache that ends with the last row.

All of it is one program, so no token crosses to the host before the last one is known. Rows that have ended, and rows
that are no examples (weight 0), emit padding. The same loop can be left after some tokens and gone on with, for those
who want to read along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from pgdist.decode.beams import BeamSearch
from pgdist.decode.logits import Logits
from pgdist.decode.sampling import Sampler, Sampling, Sequences
from pgdist.decode.steps import Steps
from pgdist.models.paligemma import DecodingState

PyTree = Any


class Search(Protocol):
    """How sequences grow: `pgdist.decode.sampling.Sampler` or `pgdist.decode.beams.BeamSearch`.

    What it carries from token to token is a pytree of arrays whose first axis is the example's.  width (C): of each
    example; max_new_tokens (M): of each.
    """

    max_new_tokens: int

    @property
    def width(self) -> int: ...

    def start(self, example: jax.Array, is_real: jax.Array, seed: jax.Array) -> PyTree: ...

    def is_active(self, found: PyTree) -> jax.Array: ...

    def choose(
        self, step: jax.Array, logits: Logits, found: PyTree
    ) -> tuple[jax.Array, jax.Array | None, PyTree]: ...

    def results(self, found: PyTree) -> Sequences: ...


def make_search(how: Sampling, *, max_new_tokens: int, eos_id: int, pad_id: int) -> Search:
    """The search that `how.method` names."""
    kind = BeamSearch if how.method == "beam" else Sampler
    return kind(how=how, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id)


@flax.struct.dataclass
class Carry:
    """What the loop carries.  step: int32[], tokens chosen so far.  token: int32[B, C], the last of each sequence, not
    read yet.  found: the search's own.  state: the model's, of B * C rows.
    """

    step: jax.Array
    token: jax.Array
    found: PyTree
    state: DecodingState


def begin(steps: Steps, search: Search, batch: Mapping[str, jax.Array], seed: jax.Array) -> Carry:
    """Reads images and prompts and chooses the first token of each sequence.

    batch: image uint8[B, S, S, 3]; text int32[B, P], right-padded; mask_input int[B, P], 1 on real tokens; mask_ar
    int[B, P], 1 on a suffix, which is hidden: a batch made for scoring can be decoded as it is; weight float[B], 0 for
    rows that are no examples; index int32[B], the examples' ids.  seed: uint32[].
    """
    prompt_mask = (batch["mask_input"] > 0) & (batch["mask_ar"] == 0)
    logits, state = steps.prefill(
        batch["image"],
        batch["text"],
        prompt_mask,
        max_new_tokens=search.max_new_tokens
        - 1,  # the last new token is never read back, so it needs no slot
    )
    found = search.start(batch["index"], batch["weight"] > 0, seed)
    is_needed = steps.any(search.is_active(found))  # by none where no row is an example
    # All go on from the one prompt.
    token, _, found = search.choose(jnp.int32(0), logits.repeat(search.width), found)
    state = _repeat(state, search.width)
    return Carry(step=is_needed.astype(jnp.int32), token=token, found=found, state=state)


def advance(steps: Steps, search: Search, carry: Carry, until: int | jax.Array) -> Carry:
    """Chooses tokens until there are `until` of each sequence, or all rows on all devices have ended."""

    def unfinished(carry: Carry) -> jax.Array:
        return (carry.step < until) & steps.any(search.is_active(carry.found))

    def next_token(carry: Carry) -> Carry:
        logits, state = steps.extend(carry.token.reshape(-1), carry.state)
        token, parent, found = search.choose(carry.step, logits, carry.found)
        if parent is not None:
            state = _follow(state, parent)
        return Carry(step=carry.step + 1, token=token, found=found, state=state)

    return jax.lax.while_loop(unfinished, next_token, carry)


def decode(
    steps: Steps, search: Search, batch: Mapping[str, jax.Array], seed: jax.Array
) -> tuple[Sequences, jax.Array]:
    """The answers to a batch (see `begin`), and how many tokens the longest took, int32[]."""
    carry = advance(steps, search, begin(steps, search, batch, seed), search.max_new_tokens)
    return search.results(carry.found), carry.step


def _repeat(state: DecodingState, times: int) -> DecodingState:
    """Of B rows, for B * times: each row's sequences lie side by side."""
    if times == 1:
        return state
    row = jnp.repeat(jnp.arange(state.position.shape[0]), times)
    return state.replace(kv=_take_rows(state, row), visible=state.visible[row], position=state.position[row])


def _follow(state: DecodingState, parent: jax.Array) -> DecodingState:
    """The cache of the sequences that were gone on from, int32[B, C]; all else is the same for those of an example."""
    examples, width = parent.shape
    row = (parent + width * jnp.arange(examples)[:, None]).reshape(-1)
    return state.replace(kv=_take_rows(state, row))


def _take_rows(state: DecodingState, row: jax.Array) -> PyTree:
    """The cache of the rows int32[R], each with all of its heads."""
    rows = state.position.shape[0]

    def take(array: jax.Array) -> jax.Array:
        return array.reshape(rows, -1, *array.shape[1:])[row].reshape(-1, *array.shape[1:])

    return jax.tree.map(take, state.kv)
