"""Who sees whom: image, prefix, suffix and padding; and decoding token by token against the whole sequence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdist.models import PaliGemma, PaliGemmaConfig, normalize_image
from tests.models.small import FIRST_WORD, PAD, SMALL, random_batch, random_parameters, with_text

CONFIGS = SMALL | {"paligemma2-capped": with_text(SMALL["paligemma2"], final_logits_softcap=2.0)}
PREFIX, SUFFIX, LENGTH = 5, 4, 12

every_config = pytest.mark.parametrize("name", CONFIGS)
both_layouts = pytest.mark.parametrize("name", SMALL)


@functools.cache
def parameters(name: str) -> dict:
    return random_parameters(CONFIGS[name], seed=0)


@functools.cache
def _jitted(name: str, method: str, **static: int):
    return jax.jit(functools.partial(PaliGemma(CONFIGS[name]).apply, method=method, **static))


def logits(name: str, image, text, mask_ar, mask_input=None) -> np.ndarray:
    """float32[B, T, V]; the image is uint8."""
    apply = _jitted(name, "__call__")
    return np.asarray(apply({"params": parameters(name)}, normalize_image(image), text, mask_ar, mask_input))


def one_example(config: PaliGemmaConfig, **lengths: int) -> dict[str, np.ndarray]:
    sizes = {"prefix": PREFIX, "suffix": SUFFIX, "length": LENGTH} | lengths
    return random_batch(
        config, prefixes=[sizes["prefix"]], suffixes=[sizes["suffix"]], length=sizes["length"], seed=1
    )


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


@every_config
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


@every_config
def test_more_padding_anywhere_changes_nothing(name):
    batch = one_example(CONFIGS[name], length=PREFIX + SUFFIX)
    expected = logits(name, batch["image"], batch["text"], batch["mask_ar"])
    # Padding in front of the text, between prefix and suffix, and behind: positions count real tokens alone.
    real = np.zeros((1, PREFIX + SUFFIX + 8), bool)
    real[:, 2 : 2 + PREFIX] = real[:, 5 + PREFIX : 5 + PREFIX + SUFFIX] = True
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
    config, new_tokens = CONFIGS[name], 6
    counts = np.array([4, 9, 1, 6])
    batch = random_batch(config, prefixes=counts, suffixes=[new_tokens] * 4, length=16, seed=3)
    expected = logits(name, batch["image"], batch["text"], batch["mask_ar"], batch["mask_input"])

    prompt_mask = (batch["mask_input"] * (1 - batch["mask_ar"]))[:, : counts.max()]
    prompt = np.where(prompt_mask, batch["text"][:, : counts.max()], FIRST_WORD)  # padding of any id
    variables = {"params": parameters(name)}
    # No slot to spare: the last token that is read fills the cache.
    prefill = _jitted(name, "prefill", max_new_tokens=new_tokens - 1)
    extend = _jitted(name, "extend")
    found, state = prefill(variables, normalize_image(batch["image"]), prompt, prompt_mask)
    for step in range(new_tokens):
        at = (np.arange(4), counts + step - 1)
        np.testing.assert_allclose(found, expected[at], rtol=0, atol=1e-5, err_msg=f"step {step}")
        if step < new_tokens - 1:
            found, state = extend(variables, batch["text"][np.arange(4), counts + step], state)
    np.testing.assert_array_equal(state.position, config.image.num_tokens + counts + new_tokens - 1)
    assert state.slot == state.kv.key.shape[2] == state.visible.shape[1]


def test_final_softcap_holds_in_the_full_pass_and_in_decoding():
    cap = CONFIGS["paligemma2-capped"].text.final_logits_softcap
    raw, capped = (
        _all_logits(name, parameters("paligemma2")) for name in ("paligemma2", "paligemma2-capped")
    )
    for key in ("__call__", "prefill", "extend"):
        assert np.abs(raw[key]).max() > cap
        np.testing.assert_allclose(capped[key], cap * np.tanh(raw[key] / cap), rtol=0, atol=1e-5, err_msg=key)


def _all_logits(name: str, params: dict) -> dict[str, np.ndarray]:
    batch = one_example(CONFIGS[name])
    variables, image = {"params": params}, normalize_image(jnp.asarray(batch["image"]))
    full = _jitted(name, "__call__")(variables, image, batch["text"], batch["mask_ar"], batch["mask_input"])
    first, state = _jitted(name, "prefill", max_new_tokens=1)(
        variables, image, batch["text"], batch["mask_input"]
    )
    second, _ = _jitted(name, "extend")(variables, jnp.argmax(first, axis=-1), state)
    return {"__call__": np.asarray(full), "prefill": np.asarray(first), "extend": np.asarray(second)}
