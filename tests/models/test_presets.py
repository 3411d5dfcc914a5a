"""The published sizes: parameter counts, names and shapes, and the fields in which the decoders differ."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest

from pgdist.models import PRESETS, parameter_shapes, preset
from tests.models.small import flat_shapes

# Parameters at 224 pixels, and D, L, F, N, K, H of the decoder.
PUBLISHED = {
    "paligemma-3b": (2_923_335_408, (2048, 18, 16_384, 8, 1, 256)),
    "paligemma2-3b": (3_032_094_960, (2304, 26, 9216, 8, 4, 256)),
    "paligemma2-10b": (9_662_409_456, (3584, 42, 14_336, 16, 8, 256)),
    "paligemma2-28b": (27_650_192_112, (4608, 46, 36_864, 32, 16, 128)),
}
IMAGE_TOKENS = {224: 256, 448: 1024, 896: 4096}
IMAGE_WIDTH = 1152

every_model = pytest.mark.parametrize("name", PUBLISHED)
every_size = pytest.mark.parametrize("size", IMAGE_TOKENS)


@every_model
@every_size
def test_parameter_count_is_the_published_one(name, size):
    at_224, _ = PUBLISHED[name]
    # A larger image has more position embeddings, and nothing else.
    expected = at_224 + (IMAGE_TOKENS[size] - IMAGE_TOKENS[224]) * IMAGE_WIDTH
    shapes = flat_shapes(PRESETS[f"{name}-{size}"])
    assert sum(math.prod(shape) for shape in shapes.values()) == expected


@every_model
@every_size
def test_names_and_shapes_are_those_of_the_published_checkpoint(name, size):
    _, (d, l, f, n, k, h) = PUBLISHED[name]
    block, attention = "img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
    expected = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/embedding/bias": (1152,),
        "img/pos_embedding": (1, IMAGE_TOKENS[size], 1152),
        f"{block}/LayerNorm_0/scale": (27, 1152),
        f"{block}/LayerNorm_0/bias": (27, 1152),
        f"{block}/LayerNorm_1/scale": (27, 1152),
        f"{block}/LayerNorm_1/bias": (27, 1152),
        f"{block}/{attention}/query/kernel": (27, 1152, 16, 72),
        f"{block}/{attention}/query/bias": (27, 16, 72),
        f"{block}/{attention}/key/kernel": (27, 1152, 16, 72),
        f"{block}/{attention}/key/bias": (27, 16, 72),
        f"{block}/{attention}/value/kernel": (27, 1152, 16, 72),
        f"{block}/{attention}/value/bias": (27, 16, 72),
        f"{block}/{attention}/out/kernel": (27, 16, 72, 1152),
        f"{block}/{attention}/out/bias": (27, 1152),
        f"{block}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        f"{block}/MlpBlock_0/Dense_0/bias": (27, 4304),
        f"{block}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        f"{block}/MlpBlock_0/Dense_1/bias": (27, 1152),
        "img/Transformer/encoder_norm/scale": (1152,),
        "img/Transformer/encoder_norm/bias": (1152,),
        "img/head/kernel": (1152, d),
        "img/head/bias": (d,),
        "llm/embedder/input_embedding": (257_152, d),
        "llm/final_norm/scale": (d,),
        "llm/layers/attn/q_einsum/w": (l, n, d, h),
        "llm/layers/attn/kv_einsum/w": (l, 2, k, d, h),
        "llm/layers/attn/attn_vec_einsum/w": (l, n, h, d),
        "llm/layers/mlp/gating_einsum": (l, 2, d, f),
        "llm/layers/mlp/linear": (l, f, d),
        "llm/layers/pre_attention_norm/scale": (l, d),
        "llm/layers/pre_ffw_norm/scale": (l, d),
    }
    if name.startswith("paligemma2"):
        expected["llm/layers/post_attention_norm/scale"] = (l, d)
        expected["llm/layers/post_ffw_norm/scale"] = (l, d)
    assert flat_shapes(PRESETS[f"{name}-{size}"]) == expected
    assert len(expected) == (34 if name.startswith("paligemma2") else 32)


@every_model
def test_decoders_differ_in_scale_and_caps_as_published(name):
    text = PRESETS[f"{name}-224"].text
    second = name.startswith("paligemma2")
    # The 27B scales by (D/N)^-0.5 = 144^-0.5, all others by H^-0.5.
    assert text.query_scale == (144**-0.5 if name == "paligemma2-28b" else 256**-0.5)
    assert text.attn_logits_softcap == (50.0 if second else 0.0)
    assert text.final_logits_softcap == 0.0
    assert text.post_norms is second


@pytest.mark.parametrize("name", PRESETS)
def test_connector_and_widths_fit_together(name):
    config = PRESETS[name]
    assert config.image.output_dim == config.text.width
    assert config.image.width % config.image.num_heads == 0
    assert config.text.num_heads % config.text.num_kv_heads == 0


def test_preset_sets_each_towers_dtype_and_leaves_the_sizes():
    config = preset(
        "tiny", image_dtype="float16", text_dtype="bfloat16", final_logits_softcap=30.0, remat="full"
    )
    assert (jnp.dtype(config.image.dtype), jnp.dtype(config.text.dtype)) == (jnp.float16, jnp.bfloat16)
    assert config.text.final_logits_softcap == 30.0
    assert (config.image.remat, config.text.remat) == ("full", "full")
    assert parameter_shapes(config) == parameter_shapes(PRESETS["tiny"])


def test_unknown_preset_is_a_key_error():
    with pytest.raises(KeyError):
        preset("paligemma-7b-224")
