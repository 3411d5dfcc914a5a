"""Every implementation of attention against the plain formula in float64, forward and backward."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.errors import ConfigError
from pgdist.models import PaliGemma, attention, flash_attention, presets
from pgdist.models.attention import Visibility, attend
from pgdist.models.paligemma import prefix_lm_visibility
from pgdist.train.gathering import ShardedModel

_IMAGE_TOKENS, _TEXT_TOKENS = 144, 20  # neither the sum nor the image is a multiple of a kernel's block


def _inputs(*, heads: int, kv_heads: int, size: int, queries: int, keys: int, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    shapes = {
        "query": (2, queries, heads, size),
        "key": (2, keys, kv_heads, size),
        "value": (2, keys, kv_heads, size),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["query"] *= 3 * size**-0.5
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def _prefix_lm(*, padding: int = 3) -> Visibility:
    """Rows with prefixes of 4 and 11 tokens and some padding; the first sees no padding."""
    length = _IMAGE_TOKENS + _TEXT_TOKENS
    position = np.arange(length)
    mask_ar = np.stack([position >= _IMAGE_TOKENS + prefix for prefix in (4, 11)]).astype(np.int32)
    real = np.stack([position < length, position < length - padding])
    return prefix_lm_visibility(jnp.asarray(mask_ar), jnp.asarray(real), num_open=_IMAGE_TOKENS)


def _exact(query, key, value, mask, cap):
    """In float64, by the definition: what is attended, the probabilities, and the logits before the soft-cap."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    raw = np.einsum("btnh,bsnh->bnts", query, key)
    logits = cap * np.tanh(raw / cap) if cap else raw
    logits = np.where(mask[:, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", probs, value), probs, raw


def _exact_gradients(query, key, value, mask, cap, cotangent):
    """Gradients of sum(cotangent * attended) in float64, by the chain rule."""
    out, probs, raw = _exact(query, key, value, mask, cap)
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    kv_heads, groups = key.shape[2], query.shape[2] // key.shape[2]
    key_n, value_n = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    d_probs = np.einsum("btnh,bsnh->bnts", cotangent, value_n)
    d_logits = probs * (d_probs - np.sum(probs * d_probs, -1, keepdims=True))
    if cap:
        d_logits = d_logits * (1 - np.tanh(raw / cap) ** 2)

    def over_groups(x):
        return x.reshape(*x.shape[:2], kv_heads, groups, -1).sum(3)

    return {
        "query": np.einsum("bnts,bsnh->btnh", d_logits, key_n),
        "key": over_groups(np.einsum("bnts,btnh->bsnh", d_logits, query)),
        "value": over_groups(np.einsum("bnts,btnh->bsnh", probs, cotangent)),
    }


def _run(implementation, inputs, visibility, cap, cotangent):
    def scalar(inputs):
        attended = attend(**inputs, visibility=visibility, logits_softcap=cap, implementation=implementation)
        return jnp.sum(attended.astype(jnp.float32) * cotangent), attended

    (_, attended), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)
    return attended, gradients


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TPU's kernel runs operation by operation; cuDNN's is the same function of JAX without cuDNN."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *x, implementation, **more: plain(*x, implementation="xla", **more),
    )
    make = flash_attention.splash_kernel.make_splash_mha
    monkeypatch.setattr(
        flash_attention.splash_kernel, "make_splash_mha", functools.partial(make, interpret=True)
    )


@pytest.mark.parametrize(
    ("implementation", "cap"),
    [
        ("plain", 0.0),
        ("plain", 2.0),
        ("chunked", 0.0),
        ("chunked", 2.0),
        ("splash", 0.0),
        ("splash", 2.0),
        ("cudnn", 0.0),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_prefix_lm_attention_is_the_formula_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, implementation: str, cap: float, heads: int, kv_heads: int
) -> None:
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2 * heads * 50 * 164)  # chunks of at most 50 queries
    visibility, length = _prefix_lm(), _IMAGE_TOKENS + _TEXT_TOKENS
    inputs = _inputs(heads=heads, kv_heads=kv_heads, size=16, queries=length, keys=length)
    mask = np.asarray(visibility.key_block[:, None, :] <= visibility.query_block[:, :, None])
    cotangent = np.random.default_rng(1).standard_normal(inputs["query"].shape).astype(np.float32)
    attended, gradients = _run(implementation, inputs, visibility, cap, cotangent)
    expected, _, _ = _exact(**inputs, mask=mask, cap=cap)
    np.testing.assert_allclose(attended, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for name, exact in _exact_gradients(**inputs, mask=mask, cap=cap, cotangent=cotangent).items():
        np.testing.assert_allclose(
            gradients[name], exact, rtol=0, atol=3e-6 * np.abs(exact).max(), err_msg=name
        )


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_an_image_attends_to_all_of_itself(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2 * 4 * 50 * 144)
    inputs = _inputs(heads=4, kv_heads=4, size=72, queries=_IMAGE_TOKENS, keys=_IMAGE_TOKENS)
    mask = np.ones((2, _IMAGE_TOKENS, _IMAGE_TOKENS), bool)
    cotangent = np.random.default_rng(1).standard_normal(inputs["query"].shape).astype(np.float32)
    attended, gradients = _run(implementation, inputs, None, 0.0, cotangent)
    expected, _, _ = _exact(**inputs, mask=mask, cap=0.0)
    np.testing.assert_allclose(attended, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for name, exact in _exact_gradients(**inputs, mask=mask, cap=0.0, cotangent=cotangent).items():
        np.testing.assert_allclose(
            gradients[name], exact, rtol=0, atol=3e-6 * np.abs(exact).max(), err_msg=name
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """As much of a jax.Device as is looked at."""

    platform: str
    compute_capability: str = "0"


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (Device(platform="tpu"), {}, "splash"),
        (Device(platform="tpu"), {"length": 256}, "plain"),
        (Device(platform="tpu"), {"logits_softcap": 50.0}, "splash"),
        (Device(platform="tpu"), {"dtype": "float32"}, "chunked"),
        (Device(platform="gpu", compute_capability="9.0"), {}, "cudnn"),
        (Device(platform="gpu", compute_capability="9.0"), {"length": 256}, "plain"),
        (Device(platform="gpu", compute_capability="9.0"), {"logits_softcap": 50.0}, "chunked"),
        (Device(platform="gpu", compute_capability="9.0"), {"head_dim": 256}, "chunked"),
        (Device(platform="gpu", compute_capability="9.0"), {"dtype": "float32"}, "chunked"),
        (Device(platform="gpu", compute_capability="7.5"), {}, "chunked"),
        (Device(platform="gpu", compute_capability="gfx942"), {}, "chunked"),
        (Device(platform="cpu"), {}, "chunked"),
    ],
)
def test_a_kernel_is_chosen_where_it_can_do_the_work(device: Device, changes: dict, expected: str) -> None:
    case = {"length": 1024, "head_dim": 72, "dtype": "bfloat16"} | changes
    assert attention.choose(device, **case) == expected


HOPPER = Device(platform="gpu", compute_capability="9.0")


@pytest.mark.parametrize(
    ("name", "device", "preset", "dtype", "message"),
    [
        (
            "splash",
            Device(platform="cpu"),
            "paligemma-3b-224",
            "bfloat16",
            "for tpu devices, these are cpu",
        ),
        (
            "splash",
            Device(platform="tpu"),
            "paligemma-3b-224",
            "float32",
            "for bfloat16 and float16, this is float32",
        ),
        (
            "cudnn",
            Device(platform="gpu", compute_capability="9.0"),
            "paligemma2-28b-224",
            "bfloat16",
            "has no soft-cap",
        ),
        (
            "cudnn",
            Device(platform="gpu", compute_capability="9.0"),
            "paligemma-3b-224",
            "bfloat16",
            "these have 256",
        ),
        (
            "cudnn",
            Device(platform="gpu", compute_capability="7.5"),
            "paligemma-3b-224",
            "float16",
            "capability 8.0",
        ),
        (
            "cudnn",
            Device(platform="gpu", compute_capability="gfx942"),
            "paligemma-3b-224",
            "bfloat16",
            "NVIDIA GPU",
        ),
    ],
)
def test_a_kernel_that_cannot_do_the_work_is_a_config_error(
    name: str, device: Device, preset: str, dtype: str, message: str
) -> None:
    mesh = types.SimpleNamespace(devices=np.array([device]))
    model = PaliGemma(presets.preset(preset, image_dtype=dtype, text_dtype=dtype))
    with pytest.raises(ConfigError, match=f"config.model.attention={name}: .*{message}.*leave it at auto"):
        ShardedModel(model, mesh=mesh, parameters={}, attention=name)
