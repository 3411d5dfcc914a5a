"""One example's text as the model reads it: `[BOS] prefix "\\n" suffix [EOS]`, padded, with its three masks.

The separator is tokenised on its own, so the prefix's tokens do not depend on what follows. A text that is
too long is cut at the end, EOS first, as the published trainer does; `truncated` says so, so that it can be
counted.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pgdist.data.tokenizer import Tokenizer

_SHORTEST_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedText:
    """Token ids and masks of one text, each int32[T]."""

    text: np.ndarray  # ids, padded with pad_id
    mask_ar: np.ndarray  # 1 on suffix and EOS, which only later tokens see; 0 elsewhere
    mask_loss: np.ndarray  # 1 on suffix and EOS: a token that is learnt
    mask_input: np.ndarray  # 1 on real tokens, 0 on padding
    truncated: bool  # the text did not fit into T


def prompt_ids(tokenizer: Tokenizer, prefix: str) -> list[int]:
    """`[BOS] prefix "\\n"`, all that comes before an answer."""
    return [tokenizer.bos_id, *tokenizer.encode(prefix), *tokenizer.encode("\n")]


def answer_ids(tokenizer: Tokenizer, suffix: str) -> list[int]:
    """`suffix [EOS]`, all that is learned."""
    return [*tokenizer.encode(suffix), tokenizer.eos_id]


def prompt_bucket(longest: int, *, limit: int) -> int:
    """What a batch of prompts is padded to, whose longest has so many tokens: 16, 32, 64 and so on, or `limit`.

    A length is a program to compile, and this makes them few: 4 up to 128 tokens, 6 up to 512. Finer steps would save
    little, for the 256 and more tokens of an image are read beside them.
    """
    return min(limit, max(_SHORTEST_BUCKET, 1 << (longest - 1).bit_length()))


def encode_example(tokenizer: Tokenizer, *, prefix: str, suffix: str | None, length: int) -> EncodedText:
    """Encodes prefix and suffix into `length` = T positions.

    suffix=None makes a prompt for decoding: `[BOS] prefix "\\n"` without EOS, mask_ar and mask_loss all 0.
    """
    head = prompt_ids(tokenizer, prefix)
    tail = [] if suffix is None else answer_ids(tokenizer, suffix)
    end = min(length, len(head) + len(tail))
    start = min(length, len(head))

    text = np.full(length, tokenizer.pad_id, np.int32)
    text[:end] = (head + tail)[:end]
    mask_loss = np.zeros(length, np.int32)
    mask_loss[start:end] = 1
    mask_input = np.zeros(length, np.int32)
    mask_input[:end] = 1
    return EncodedText(
        text=text,
        mask_ar=mask_loss.copy(),
        mask_loss=mask_loss,
        mask_input=mask_input,
        truncated=len(head) + len(tail) > length,
    )


def masked_text(tokenizer: Tokenizer, *, length: int) -> EncodedText:
    """The text of a masked row: all padding, nothing to learn.

    Its first position still counts as input, so that no softmax of the model is over nothing and the row
    gives no NaN: 0 * NaN would reach the loss of the whole batch.
    """
    zeros = np.zeros(length, np.int32)
    mask_input = zeros.copy()
    mask_input[0] = 1
    text = np.full(length, tokenizer.pad_id, np.int32)
    return EncodedText(text=text, mask_ar=zeros, mask_loss=zeros, mask_input=mask_input, truncated=False)
