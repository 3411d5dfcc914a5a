"""The loop over tokens against the plainest one there is: the whole forward pass again for every token."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pgdist.decode import Sampling
from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image
from tests.decode.model import (
    NEVER,
    cut_at,
    decode_batch,
    random_prompts,
    teacher_forced,
    token_ending_one_row,
    varied_parameters,
)
from tests.models.small import PAD, SMALL, with_text

NEW_TOKENS = 8
PREFIXES = (3, 9, 1, 6)
LENGTH = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """tokens: int32[B, M].  steps: how many the longest answer took."""

    tokens: np.ndarray
    steps: int


def _decode(
    config: PaliGemmaConfig, params, batch, *, eos_id: int, max_new_tokens: int = NEW_TOKENS
) -> Greedy:
    found, steps = decode_batch(config, params, batch, eos_id=eos_id, max_new_tokens=max_new_tokens)
    assert found.tokens.shape == (len(batch["text"]), 1, max_new_tokens)
    return Greedy(tokens=found.tokens[:, 0], steps=steps)


def _prompts(name: str) -> dict[str, np.ndarray]:
    return random_prompts(SMALL[name], prefixes=PREFIXES, length=LENGTH)


@functools.cache
def _naive_tokens(name: str) -> np.ndarray:
    """int32[B, M]: prompts grow by one token at a time, masks as in training, nothing is cached."""
    config, params = SMALL[name], varied_parameters(name)
    batch = _prompts(name)
    text, mask_ar, mask = (
        np.pad(batch[key], ((0, 0), (0, NEW_TOKENS))) for key in ("text", "mask_ar", "mask_input")
    )
    forward = jax.jit(PaliGemma(config).apply)
    image = normalize_image(jnp.asarray(batch["image"]))
    rows, end = np.arange(len(text)), mask.sum(axis=1)
    tokens = []
    for _ in range(NEW_TOKENS):
        logits = np.asarray(forward({"params": params}, image, text, mask_ar, mask))[rows, end - 1]
        best = np.sort(logits, axis=-1)[:, -2:]
        assert np.min(best[:, 1] - best[:, 0]) > 1e-4, "a near tie makes the comparison a matter of rounding"
        token = np.argmax(logits, axis=-1)
        text[rows, end], mask_ar[rows, end], mask[rows, end] = token, 1, 1
        end = end + 1
        tokens.append(token)
    return np.stack(tokens, axis=1)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_are_those_of_a_full_forward_pass_for_each_token(name):
    found = _decode(SMALL[name], varied_parameters(name), _prompts(name), eos_id=NEVER)
    assert len(set(found.tokens.ravel())) > NEW_TOKENS
    np.testing.assert_array_equal(found.tokens, _naive_tokens(name))
    assert found.steps == NEW_TOKENS


def test_a_row_that_has_ended_emits_padding_while_the_others_go_on():
    naive = _naive_tokens("paligemma")
    eos_id, row, step = token_ending_one_row(naive)
    found = _decode(SMALL["paligemma"], varied_parameters("paligemma"), _prompts("paligemma"), eos_id=eos_id)
    np.testing.assert_array_equal(found.tokens, cut_at(naive, eos_id, pad_id=PAD))
    assert found.tokens[row, step] == eos_id
    assert not found.tokens[row, step + 1 :].any()
    assert found.steps == NEW_TOKENS


def test_the_loop_ends_with_the_last_real_row_whatever_masked_rows_would_say():
    naive = _naive_tokens("paligemma")
    eos_id, row, step = token_ending_one_row(naive)
    batch = _prompts("paligemma")
    batch["weight"] = (np.arange(len(PREFIXES)) == row).astype(np.float32)
    found = _decode(SMALL["paligemma"], varied_parameters("paligemma"), batch, eos_id=eos_id)
    assert found.steps == step + 1
    np.testing.assert_array_equal(found.tokens[row], cut_at(naive, eos_id, pad_id=PAD)[row])
    assert not np.delete(found.tokens, row, axis=0).any()


def test_an_answer_that_ends_with_its_first_token_needs_no_loop():
    naive = _naive_tokens("paligemma")
    batch = _prompts("paligemma")
    batch["weight"] = np.array([1, 0, 0, 0], np.float32)
    found = _decode(SMALL["paligemma"], varied_parameters("paligemma"), batch, eos_id=int(naive[0, 0]))
    assert found.steps == 1
    assert found.tokens[0].tolist() == [naive[0, 0]] + [PAD] * (NEW_TOKENS - 1)


def test_a_batch_without_a_real_row_decodes_nothing():
    batch = _prompts("paligemma")
    batch["weight"] = np.zeros(len(PREFIXES), np.float32)
    found = _decode(SMALL["paligemma"], varied_parameters("paligemma"), batch, eos_id=NEVER)
    assert found.steps == 0
    assert not found.tokens.any()


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_the_token_limit_only_cuts_the_answer(max_new_tokens):
    found = _decode(
        SMALL["paligemma"],
        varied_parameters("paligemma"),
        _prompts("paligemma"),
        eos_id=NEVER,
        max_new_tokens=max_new_tokens,
    )
    np.testing.assert_array_equal(found.tokens, _naive_tokens("paligemma")[:, :max_new_tokens])


def test_padding_behind_the_prompts_changes_nothing():
    batch = _prompts("paligemma2")
    for name in ("text", "mask_ar", "mask_input"):
        batch[name] = np.pad(batch[name], ((0, 0), (0, 7)))
    batch["text"][batch["mask_input"] == 0] = 17  # whatever stands there
    found = _decode(SMALL["paligemma2"], varied_parameters("paligemma2"), batch, eos_id=NEVER)
    np.testing.assert_array_equal(found.tokens, _naive_tokens("paligemma2"))


def test_a_suffix_in_the_batch_is_not_seen():
    batch = _prompts("paligemma")
    for row, end in enumerate(batch["mask_input"].sum(axis=1)):
        batch["text"][row, end : end + 2] = (5, 7)
        batch["mask_ar"][row, end : end + 2] = 1
        batch["mask_input"][row, end : end + 2] = 1
    found = _decode(SMALL["paligemma"], varied_parameters("paligemma"), batch, eos_id=NEVER)
    np.testing.assert_array_equal(found.tokens, _naive_tokens("paligemma"))


def test_in_bfloat16_the_cache_is_bfloat16_and_each_token_is_as_good_as_the_best_one():
    config = with_text(SMALL["paligemma"], dtype=jnp.bfloat16)
    model, params, batch = PaliGemma(config), varied_parameters("paligemma"), _prompts("paligemma")
    image = normalize_image(jnp.asarray(batch["image"]))
    prefill = functools.partial(model.apply, max_new_tokens=NEW_TOKENS, method="prefill")
    _, state = jax.eval_shape(prefill, {"params": params}, image, batch["text"], batch["mask_input"])
    assert {array.dtype for array in jax.tree.leaves(state.kv)} == {jnp.dtype(jnp.bfloat16)}

    tokens = _decode(config, params, batch, eos_id=NEVER).tokens
    # At each place, how far below the best token is the chosen one?
    logits = teacher_forced(config, params, batch, tokens)
    chosen = np.take_along_axis(logits, tokens[:, :, None], axis=2)[:, :, 0]
    # Two roundings to bfloat16 (8 bits) of the hidden state a block, each half a unit, on both sides of the
    # comparison.
    tolerance = 2 * 2 * config.text.depth * 2.0**-9 * np.abs(logits).max()
    assert np.max(logits.max(axis=-1) - chosen) <= tolerance


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(method="sample", n=2, candidates=3, temperature=0.8, top_k=20, top_p=0.9, seed=5),
        Sampling(method="beam", n=3, banned=(7, 8), length_penalty=0.5),
    ],
    ids=lambda sampling: sampling.method,
)
def test_logprobs_are_those_of_one_pass_over_the_whole_answer(name, sampling):
    config, params, batch = SMALL[name], varied_parameters(name), _prompts(name)
    decode = functools.partial(
        decode_batch, config, params, batch, sampling=sampling, max_new_tokens=NEW_TOKENS
    )
    endless, _ = decode(eos_id=NEVER)
    eos_id = int(endless.tokens[0, 0, NEW_TOKENS // 2])
    tokens = (found := decode(eos_id=eos_id)[0]).tokens

    is_end = tokens == eos_id
    behind_end = np.cumsum(is_end, axis=-1) - is_end > 0
    assert behind_end.any() and not is_end.any(axis=-1).all()
    expected = np.zeros(tokens.shape)
    for number in range(sampling.n):
        logits = teacher_forced(config, params, batch, tokens[:, number])
        logprobs = scipy.special.log_softmax(logits, axis=-1)
        expected[:, number] = np.take_along_axis(logprobs, tokens[:, number, :, None], axis=-1)[..., 0]
    expected[behind_end] = 0.0
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-5)
    divisor = np.sum(~behind_end, axis=-1) ** 0.5 if sampling.method == "beam" else 1.0
    np.testing.assert_allclose(found.scores, expected.sum(axis=-1) / divisor, rtol=0, atol=1e-5)
