"""The image tower's own conventions: patches, norms, MLP, the connector, pixel values."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.models import Siglip, normalize_image
from pgdist.models.siglip import Encoder, EncoderBlock, Mlp, PatchEmbedding
from pgdist.parameters import map_named
from tests.models.small import SMALL


@pytest.mark.parametrize("image_size", [28, 33])  # 33: pixels are left over beyond the last whole patch
def test_patch_embedding_is_a_convolution_with_stride_as_long_as_its_kernel(image_size):
    config = dataclasses.replace(SMALL["paligemma"].image, image_size=image_size)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, image_size, image_size, 3)).astype(np.float32)
    kernel = rng.standard_normal((14, 14, 3, config.width)).astype(np.float32) / 24
    bias = rng.standard_normal(config.width).astype(np.float32)
    found = PatchEmbedding(config).apply({"params": {"kernel": kernel, "bias": bias}}, image)
    expected = jax.lax.conv_general_dilated(
        image, kernel, (14, 14), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert config.num_tokens == 4
    # Sums of 588 products in another order: 588^0.5 * 2^-24 = 1.4e-6 in values of order 1.
    np.testing.assert_allclose(found, expected.reshape(2, 4, config.width) + bias, rtol=0, atol=1e-5)


def test_mlp_uses_the_tanh_gelu():
    config = SMALL["paligemma"].image
    rng = np.random.default_rng(0)
    shapes = {"Dense_0": (config.width, config.mlp_dim), "Dense_1": (config.mlp_dim, config.width)}
    params = {
        name: {
            "kernel": rng.standard_normal(shape).astype(np.float32) / 8,
            "bias": rng.standard_normal(shape[1]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }
    x = rng.standard_normal((2, 3, config.width)).astype(np.float32)
    y = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    expected = y @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    # The exact GELU differs from the tanh form by up to 5e-4 a value.
    np.testing.assert_allclose(Mlp(config).apply({"params": params}, x), expected, rtol=0, atol=1e-5)


def test_layer_norms_have_an_epsilon_of_a_millionth():
    config = SMALL["paligemma"].image
    # So small that the epsilon is as large as the variance, and with blocks of zeros it stays what it is.
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 3, config.width)).astype(np.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    expected = centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + 1e-6)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0), x)["params"]
    params = map_named(lambda name, leaf: np.full(leaf.shape, float(name.endswith("scale"))), shapes)
    np.testing.assert_allclose(Encoder(config).apply({"params": params}, x), expected, rtol=0, atol=1e-5)

    first_block = jax.tree.map(lambda leaf: leaf[0], params["encoderblock"])
    _, seen = EncoderBlock(config).apply(
        {"params": first_block}, x, capture_intermediates=lambda module, _: isinstance(module, nn.LayerNorm)
    )
    assert len(seen["intermediates"]) == 2
    for normalized in jax.tree.leaves(seen["intermediates"]):
        np.testing.assert_allclose(normalized, expected, rtol=0, atol=1e-5)


def test_untrained_connector_adds_nothing_to_the_decoder():
    config = SMALL["paligemma"].image
    image = jnp.ones((1, config.image_size, config.image_size, 3))
    tokens, _ = jax.jit(Siglip(config).init_with_output)(jax.random.key(0), image)
    assert tokens.shape == (1, 16, config.output_dim)
    assert not tokens.any()


def test_pixels_reach_from_minus_one_to_one():
    found = normalize_image(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(found, [-1.0, -0.6, 1.0], rtol=1e-6)
    assert found.dtype == jnp.float32
