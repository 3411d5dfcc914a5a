"""Small models whose answers vary: what a decoding test compares must not be one token, repeated."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pgdist.models import PaliGemmaConfig
from tests.models.small import SMALL, random_batch, random_parameters


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
