"""The image tower's own conventions: patches, MLP, the connector, pixel values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgdist.models import Siglip, normalize_image
from pgdist.models.siglip import Mlp, PatchEmbedding
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
    # Sums of 588 products of order 1/24: rounding of 588^0.5 * 2^-24 at worst in a value of order 1.
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
