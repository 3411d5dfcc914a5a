"""Who sees whom: image, prefix, suffix and padding; and decoding token by token against the full pass."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image
from pgdist.models.paligemma import DecodingState
from tests.models.small import FIRST_WORD, PAD, SMALL, random_batch, random_parameters, with_text

CONFIGS = SMALL | {"paligemma2-capped": with_text(SMALL["paligemma2"], final_logits_softcap=2.0)}
PREFIX, SUFFIX, LENGTH = 5, 4, 12
NEW_TOKENS = 6
ROWS = LENGTH + 1  # one batch size for all tests, so that each model compiles once

every_config = pytest.mark.parametrize("name", CONFIGS)
both_layouts = pytest.mark.parametrize("name", SMALL)


@functools.cache
def parameters(name: str) -> dict:
    """Random ones by the seed and the shapes: the same with and without a soft-cap."""
    return random_parameters(CONFIGS[name], seed=0)


@functools.cache
def _jitted(name: str, method: str, **static: int):
    return jax.jit(functools.partial(PaliGemma(CONFIGS[name]).apply, method=method, **static))


def logits(name: str, image, text, mask_ar, mask_input) -> np.ndarray:
    """float32[B, T, V]; the image is uint8."""
    rows = len(text)
    image, *masks = (np.resize(x, (ROWS, *x.shape[1:])) for x in (image, text, mask_ar, mask_input))
    apply = _jitted(name, "__call__")
    return np.asarray(apply({"params": parameters(name)}, normalize_image(image), *masks))[:rows]


def one_example(
    config: PaliGemmaConfig, *, suffix: int = SUFFIX, length: int = LENGTH
) -> dict[str, np.ndarray]:
    return random_batch(config, prefixes=[PREFIX], suffixes=[suffix], length=length, seed=1)


def changed_positions(name: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    """bool[T, T]: [t, s] is True where another token at t, and nothing else, changes the logits at s."""
    length = batch["text"].shape[1]
    variants = np.repeat(batch["text"], length + 1, axis=0)
    vocabulary = CONFIGS[name].text.vocab_size
    for t in range(length):
        variants[t, t] = (variants[t, t] + 1) % vocabulary
    arrays = [np.repeat(batch[key], length + 1, axis=0) for key in ("image", "mask_ar", "mask_input")]
    found = logits(name, arrays[0], variants, *arrays[1:])
    # Bitwise: a masked key has probability exactly 0, so what is not seen does not even change the rounding.
    return (found[:-1] != found[-1]).any(axis=-1)


@both_layouts
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_a_token_changes_exactly_the_positions_that_see_it(name, data):
    bits = st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH)
    batch = one_example(CONFIGS[name])
    batch["mask_ar"][0], batch["mask_input"][0] = data.draw(bits), data.draw(bits)
    block = np.cumsum(batch["mask_ar"][0])
    sees = (block[None, :] <= block[:, None]) & batch["mask_input"].astype(bool)
    # A padding token reaches its own, meaningless logits through the residual connection, and no others.
    np.testing.assert_array_equal(changed_positions(name, batch), (sees | np.eye(LENGTH, dtype=bool)).T)


@both_layouts
def test_prefix_is_fully_visible_to_itself_and_the_suffix_only_backwards(name):
    changed = changed_positions(name, one_example(CONFIGS[name]))
    suffix = slice(PREFIX, PREFIX + SUFFIX)
    assert changed[:PREFIX, :PREFIX].all()
    assert changed[:PREFIX, suffix].all()
    np.testing.assert_array_equal(changed[suffix, suffix], np.triu(np.ones((SUFFIX, SUFFIX), bool)))


@both_layouts
def test_prefix_logits_do_not_depend_on_the_suffix(name):
    batch = one_example(CONFIGS[name])
    other = one_example(CONFIGS[name], suffix=SUFFIX + 2)
    other["text"][:, :PREFIX] = batch["text"][:, :PREFIX]
    found = [
        logits(name, batch["image"], b["text"], b["mask_ar"], b["mask_input"])[:, :PREFIX]
        for b in (batch, other)
    ]
    np.testing.assert_array_equal(*found)


@both_layouts
@given(pad=st.integers(0, 319), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_padding_tokens_change_nothing(name, pad, seed):
    rng = np.random.default_rng(seed)
    batch = one_example(CONFIGS[name])
    real = batch["mask_input"].astype(bool)
    text = np.where(real, batch["text"], (pad + rng.integers(0, 2, batch["text"].shape)) % 320)
    mask_ar = np.where(real, batch["mask_ar"], rng.integers(0, 2, batch["text"].shape))
    expected = logits(name, batch["image"], batch["text"], batch["mask_ar"], real)
    np.testing.assert_array_equal(logits(name, batch["image"], text, mask_ar, real)[real], expected[real])


@both_layouts
def test_more_padding_anywhere_changes_nothing(name):
    batch = one_example(CONFIGS[name], length=PREFIX + SUFFIX)
    expected = logits(name, batch["image"], batch["text"], batch["mask_ar"], batch["mask_input"])
    # Padding in front of the text, between prefix and suffix, and behind: positions count real tokens alone.
    real = np.zeros((1, LENGTH), bool)
    real[:, 1 : 1 + PREFIX] = real[:, 2 + PREFIX : 2 + PREFIX + SUFFIX] = True
    text, mask_ar = np.full(real.shape, PAD, np.int32), np.zeros(real.shape, np.int32)
    text[real], mask_ar[real] = batch["text"][0], batch["mask_ar"][0]
    found = logits(name, batch["image"], text, mask_ar, real)
    # Other shapes add up in another order.
    np.testing.assert_allclose(found[real], expected[0], rtol=0, atol=1e-5)


@both_layouts
def test_every_text_position_sees_the_image(name):
    config = CONFIGS[name]
    batch = random_batch(config, prefixes=[3, 8, 5], suffixes=[4, 2, 6], length=LENGTH, seed=2)
    text = batch["text"], batch["mask_ar"], batch["mask_input"]
    expected = logits(name, batch["image"], *text)
    permuted = logits(name, batch["image"][[1, 2, 0]], *text)
    assert (np.abs(permuted - expected).max(axis=-1) > 1e-2).all()
    # Rows know nothing of each other: permuted with their texts, the images give permuted logits.
    together = logits(name, batch["image"][[1, 2, 0]], *(x[[1, 2, 0]] for x in text))
    np.testing.assert_allclose(together, expected[[1, 2, 0]], rtol=0, atol=1e-5)


@every_config
def test_prefill_and_extend_equal_the_full_pass(name):
    config, counts = CONFIGS[name], np.array([4, 6, 1, 5])
    batch = random_batch(config, prefixes=counts, suffixes=[NEW_TOKENS] * 4, length=LENGTH, seed=3)
    expected = logits(name, batch["image"], batch["text"], batch["mask_ar"], batch["mask_input"])

    rows = np.arange(4)
    found, state = prefill(name, batch)
    for step in range(NEW_TOKENS):
        at = (rows, counts + step - 1)
        np.testing.assert_allclose(found, expected[at], rtol=0, atol=1e-5, err_msg=f"step {step}")
        if step < NEW_TOKENS - 1:
            found, state = extend(name, batch["text"][rows, counts + step], state)
    np.testing.assert_array_equal(state.position, config.image.num_tokens + counts + NEW_TOKENS - 1)
    # There was no slot to spare: the last token that was read has filled the cache.
    assert state.slot == state.kv[0].key.shape[1] == state.visible.shape[1]


def test_final_softcap_holds_in_the_full_pass_and_in_decoding():
    raw, capped = "paligemma2", "paligemma2-capped"
    cap = CONFIGS[capped].text.final_logits_softcap
    batch = random_batch(
        CONFIGS[raw], prefixes=[4, 6, 1, 5], suffixes=[NEW_TOKENS] * 4, length=LENGTH, seed=3
    )
    args = [batch[key] for key in ("image", "text", "mask_ar", "mask_input")]
    (raw_first, state), (capped_first, _) = prefill(raw, batch), prefill(capped, batch)
    token = np.full(4, FIRST_WORD)
    for uncapped, found in (
        (logits(raw, *args), logits(capped, *args)),
        (raw_first, capped_first),
        (extend(raw, token, state)[0], extend(capped, token, state)[0]),
    ):
        assert np.abs(uncapped).max() > cap
        np.testing.assert_allclose(found, cap * np.tanh(np.asarray(uncapped) / cap), rtol=0, atol=1e-5)


def prefill(name: str, batch: dict[str, np.ndarray]) -> tuple[jax.Array, DecodingState]:
    """Reads the prefixes alone, padded with words instead of padding."""
    mask = batch["mask_input"] * (1 - batch["mask_ar"])
    mask = mask[:, : mask.sum(axis=1).max()]
    prompt = np.where(mask, batch["text"][:, : mask.shape[1]], FIRST_WORD)
    apply = _jitted(name, "prefill", max_new_tokens=NEW_TOKENS - 1)
    return apply({"params": parameters(name)}, normalize_image(batch["image"]), prompt, mask)


def extend(name: str, token: np.ndarray, state: DecodingState) -> tuple[jax.Array, DecodingState]:
    return _jitted(name, "extend")({"params": parameters(name)}, token, state)
