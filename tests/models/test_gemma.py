"""The decoder's own conventions: embedding scale, norm, MLP, positions, query scale, soft-caps, heads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdist.models import Gemma, GemmaConfig, PaliGemmaConfig
from pgdist.models.attention import softcap
from pgdist.models.gemma import GatedMlp, RMSNorm, rotate
from pgdist.models.paligemma import prefix_lm_visibility
from tests.models.small import SMALL, random_parameters, with_text

LENGTH = 7


@functools.cache
def _jitted(config: GemmaConfig):
    return jax.jit(Gemma(config).apply)


def hidden(config: PaliGemmaConfig, params: dict) -> np.ndarray:
    """The decoder's outputs [2, LENGTH, D] for random embedded tokens under a causal mask."""
    x = np.random.default_rng(0).standard_normal((2, LENGTH, config.text.width)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    causal = prefix_lm_visibility(jnp.ones((2, LENGTH), int), jnp.ones((2, LENGTH), bool))
    y, _ = _jitted(config.text)({"params": params["llm"]}, x, positions=positions, visibility=causal)
    return np.asarray(y)


def replaced(params: dict, changes: dict) -> dict:
    """The parameters with `changes[name](array)` in place of some arrays."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(flat | {k: f(flat[k]) for k, f in changes.items()}, sep="/")


@pytest.mark.parametrize("size", [1.0, 1e-3])  # at 1e-3 the epsilon of 1e-6 is as large as the mean square
def test_rms_norm_multiplies_by_one_plus_scale(size):
    rng = np.random.default_rng(0)
    x, scale = size * rng.standard_normal((5, 24)), rng.standard_normal(24)
    found = RMSNorm().apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_token_embeddings_are_multiplied_by_the_root_of_the_width():
    config = SMALL["paligemma"]
    llm = random_parameters(config, seed=0)["llm"]
    found = Gemma(config.text).apply({"params": llm}, np.array([[3, 319]]), method=Gemma.embed)
    expected = llm["embedder"]["input_embedding"][[3, 319]] * 72**0.5
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_mlp_multiplies_the_second_half_by_the_tanh_gelu_of_the_first():
    rng = np.random.default_rng(0)
    config = SMALL["paligemma"].text
    gating = rng.standard_normal((2, 72, 112)).astype(np.float32) / 8
    linear = rng.standard_normal((112, 72)).astype(np.float32) / 8
    x = rng.standard_normal((2, 3, 72)).astype(np.float32)
    found = GatedMlp(config).apply({"params": {"gating_einsum": gating, "linear": linear}}, x)
    gate = x @ gating[0]
    gelu = gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    # The exact GELU differs from the tanh form by up to 5e-4 a value.
    np.testing.assert_allclose(found, (gelu * (x @ gating[1])) @ linear, rtol=0, atol=1e-5)


def test_rotary_embedding_turns_first_half_with_second():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 32))
    positions = rng.integers(0, 500, (2, 5))
    # Features j and j + H/2 are one complex number, turned by position / 10,000^(2j/H).
    angle = positions[:, :, None, None] / 10_000.0 ** (np.arange(16) / 16)
    turned = (x[..., :16] + 1j * x[..., 16:]) * np.exp(1j * angle)
    found = rotate(jnp.float32(x), jnp.asarray(positions))
    # float32 angles up to 500 have an error of 500 * 2^-24 = 3e-5 before sine and cosine.
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=3e-4)


@given(shift=st.integers(1, 300))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_attention_logits_depend_on_the_distance_of_positions_alone(shift):
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((1, 6, 1, 32)), jnp.float32) for _ in range(2))

    def logits(positions):
        return jnp.einsum("bqnh,bknh->bqk", rotate(query, positions), rotate(key, positions))

    positions = jnp.arange(6)[None]
    np.testing.assert_allclose(logits(positions + shift), logits(positions), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_query_scale_multiplies_queries(name):
    config = SMALL[name]
    params = random_parameters(config, seed=0)
    louder = replaced(params, {"llm/layers/attn/q_einsum/w": lambda w: 4 * w})
    quieter = with_text(config, query_scale=config.text.query_scale / 4)
    # A power of two rounds nowhere, so nothing at all changes.
    np.testing.assert_array_equal(hidden(quieter, louder), hidden(config, params))
    assert np.abs(hidden(quieter, params) - hidden(config, params)).max() > 0.1


def test_shared_key_value_heads_serve_neighbouring_query_heads():
    config = SMALL["paligemma2"]
    params = random_parameters(config, seed=0)
    repeat = config.text.num_heads // config.text.num_kv_heads
    copied = replaced(params, {"llm/layers/attn/kv_einsum/w": lambda w: np.repeat(w, repeat, axis=2)})
    found = hidden(with_text(config, num_kv_heads=config.text.num_heads), copied)
    np.testing.assert_allclose(found, hidden(config, params), rtol=0, atol=1e-5)


def test_softcap_bounds_logits_and_zero_is_none():
    logits = jnp.linspace(-200.0, 200.0, 101)
    np.testing.assert_allclose(softcap(logits, 50.0), 50 * np.tanh(np.asarray(logits) / 50), rtol=1e-5)
    np.testing.assert_array_equal(softcap(logits, 0.0), logits)


def test_attention_softcap_acts_on_attention_logits_alone():
    config = SMALL["paligemma2"]
    params = random_parameters(config, seed=0)
    other = replaced(params, {"llm/layers/attn/q_einsum/w": lambda w: w[:, ::-1]})
    uncapped = with_text(config, attn_logits_softcap=0.0)
    assert np.abs(hidden(uncapped, params) - hidden(config, params)).max() > 1e-4
    np.testing.assert_allclose(
        hidden(with_text(config, attn_logits_softcap=1e5), params),
        hidden(uncapped, params),
        rtol=0,
        atol=1e-4,
    )
    # Capped to nothing, attention is uniform and no longer knows its queries.
    blind = with_text(config, attn_logits_softcap=1e-6)
    np.testing.assert_allclose(hidden(blind, other), hidden(blind, params), rtol=0, atol=1e-4)
    assert np.abs(hidden(uncapped, other) - hidden(uncapped, params)).max() > 0.1
