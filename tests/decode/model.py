"""Small models whose answers vary: what a decoding test compares must not be one token, repeated."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from pgdist.decode import Sampling, loop
from pgdist.decode.sampling import Sequences
from pgdist.decode.steps import WholeSteps
from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image
from tests.models.small import PAD, SMALL, random_batch, random_parameters

NEVER = -1  # an end-of-sequence id that no model emits
GREEDY = Sampling()


@functools.cache
def varied_parameters(name: str) -> dict:
    """Random parameters of SMALL[name] under which the next token depends on all that was read.

    Left alone, tied embeddings make the token just read the likeliest next one, and dull attention sees the
    mean of the image.
    """
    params = random_parameters(SMALL[name], seed=0)
    llm = params["llm"]
    llm["embedder"]["input_embedding"] *= 0.3
    llm["layers"]["attn"]["q_einsum"]["w"] *= 8.0
    # The final norm multiplies by 1 + scale: half of the signs turned, a token no longer looks like itself.
    llm["final_norm"]["scale"] = np.where(np.arange(SMALL[name].text.width) % 2, -2.0, 0.0).astype(np.float32)
    return params


def random_prompts(
    config: PaliGemmaConfig, *, prefixes: Sequence[int], length: int, seed: int = 1
) -> dict[str, np.ndarray]:
    """A batch of random images and prompts of these lengths, without suffixes."""
    return random_batch(config, prefixes=prefixes, suffixes=[0] * len(prefixes), length=length, seed=seed)


@functools.cache
def _program(config: PaliGemmaConfig, search: loop.Search):
    def decode(params, batch, seed):
        return loop.decode(WholeSteps(model=PaliGemma(config), params=params), search, batch, seed)

    return jax.jit(decode)


def decode_batch(
    config: PaliGemmaConfig,
    params: dict,
    batch: dict[str, np.ndarray],
    *,
    sampling: Sampling = GREEDY,
    eos_id: int,
    max_new_tokens: int,
) -> tuple[Sequences, int]:
    """`pgdist.decode.loop.decode` on one device: the answers as numpy arrays, and the number of steps.

    Rows whose batch gives them no ids have their numbers.
    """
    batch = {"index": np.arange(len(batch["text"]), dtype=np.int32)} | batch
    search = loop.make_search(sampling, max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=PAD)
    found, steps = _program(config, search)(params, batch, np.uint32(sampling.seed))
    return jax.tree.map(np.asarray, found), int(steps)


def teacher_forced(
    config: PaliGemmaConfig, params: dict, batch: dict[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    """float64[B, M, V], the logits behind which int[B, M] tokens were chosen: all by one forward pass over the prompts
    of a batch with the tokens as suffixes, masked as in training.
    """
    new = tokens.shape[1]
    text, mask_ar, mask = (
        np.pad(batch[key], ((0, 0), (0, new))) for key in ("text", "mask_ar", "mask_input")
    )
    places = batch["mask_input"].sum(axis=1)[:, None] + np.arange(new)
    for array, values in ((text, tokens), (mask_ar, 1), (mask, 1)):
        np.put_along_axis(array, places, values, axis=1)
    logits = _forward(config)({"params": params}, normalize_image(batch["image"]), text, mask_ar, mask)
    return np.take_along_axis(np.asarray(logits, np.float64), places[:, :, None] - 1, axis=1)


@functools.cache
def _forward(config: PaliGemmaConfig):
    return jax.jit(PaliGemma(config).apply)


def cut_at(tokens: np.ndarray, eos_id: int, *, pad_id: int) -> np.ndarray:
    """int[B, M] with padding behind each row's first `eos_id`."""
    ended = np.cumsum(tokens == eos_id, axis=1) - (tokens == eos_id) > 0
    return np.where(ended, pad_id, tokens)


def token_ending_one_row(tokens: np.ndarray) -> tuple[int, int, int]:
    """(token, row, step): a token that only one row has, from that step on, neither the first nor the last"""
    for row, answer in enumerate(tokens):
        others = np.delete(tokens, row, axis=0)
        for step in range(1, tokens.shape[1] - 1):
            if answer[step] not in others and answer[step] not in answer[:step]:
                return int(answer[step]), row, step
    raise AssertionError("no such token: choose another seed")
