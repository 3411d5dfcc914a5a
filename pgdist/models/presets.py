"""Every published size by name, and `tiny`, the size of the model that the repository carries.

Figures: PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555), and the published implementation's
variants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from flax import traverse_util
from jax.typing import DTypeLike

from pgdist.models.gemma import GemmaConfig
from pgdist.models.paligemma import PaliGemmaConfig, parameter_shapes
from pgdist.models.siglip import SiglipConfig

_GEMMA_2B = GemmaConfig(
    width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256, query_scale=256**-0.5
)
_GEMMA2_2B = GemmaConfig(
    width=2304, depth=26, mlp_dim=9216, num_heads=8, num_kv_heads=4, head_dim=256, query_scale=256**-0.5,
    attn_logits_softcap=50.0, post_norms=True,
)  # fmt: skip
_GEMMA2_9B = GemmaConfig(
    width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, head_dim=256, query_scale=256**-0.5,
    attn_logits_softcap=50.0, post_norms=True,
)  # fmt: skip
_GEMMA2_27B = GemmaConfig(
    width=4608, depth=46, mlp_dim=36_864, num_heads=32, num_kv_heads=16, head_dim=128, query_scale=144**-0.5,
    attn_logits_softcap=50.0, post_norms=True,
)  # fmt: skip
_TINY_TEXT = GemmaConfig(
    width=64, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32, query_scale=32**-0.5,
    vocab_size=1344,
)  # fmt: skip
_TINY_IMAGE = SiglipConfig(
    image_size=56, patch_size=8, width=64, depth=3, num_heads=4, mlp_dim=128, output_dim=_TINY_TEXT.width
)


def _published(decoder: GemmaConfig, image_size: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(image=SiglipConfig(image_size=image_size, output_dim=decoder.width), text=decoder)


PRESETS: Mapping[str, PaliGemmaConfig] = {
    f"{name}-{size}": _published(decoder, size)
    for name, decoder in (
        ("paligemma-3b", _GEMMA_2B),
        ("paligemma2-3b", _GEMMA2_2B),
        ("paligemma2-10b", _GEMMA2_9B),
        ("paligemma2-28b", _GEMMA2_27B),
    )
    for size in (224, 448, 896)
} | {"tiny": PaliGemmaConfig(image=_TINY_IMAGE, text=_TINY_TEXT)}


def preset(
    name: str,
    *,
    image_dtype: DTypeLike = "float32",
    text_dtype: DTypeLike = "float32",
    final_logits_softcap: float = 0.0,
    remat: str = "none",
) -> PaliGemmaConfig:
    """A preset with the compute dtype of each tower; KeyError for a name that is not in PRESETS."""
    base = PRESETS[name]
    return PaliGemmaConfig(
        image=dataclasses.replace(base.image, dtype=image_dtype, remat=remat),
        text=dataclasses.replace(
            base.text, dtype=text_dtype, final_logits_softcap=final_logits_softcap, remat=remat
        ),
    )


def preset_layouts() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{preset: {parameter name: shape}}, for telling which preset a file of weights belongs to."""
    return {
        name: traverse_util.flatten_dict(parameter_shapes(config), sep="/")
        for name, config in PRESETS.items()
    }


def config_of(shapes: Mapping[str, tuple[int, ...]], *, final_logits_softcap: float = 0.0) -> PaliGemmaConfig:
    """The model whose arrays have these shapes; KeyError for an array that it needs and is not there.

    shapes: {parameter name, joined by "/": shape}; others are not looked at.

    Shapes do not tell how queries are scaled and attention logits capped: these are the preset's whose decoder has
    the same sizes, else H^-0.5 and, as in Gemma 2, 50 with post-norms. Nor do they tell pixels beyond the last
    whole patch: the image has none.
    """
    block = "img/Transformer/encoderblock"
    patch_size = shapes["img/embedding/kernel"][0]
    depth, width, num_heads, _ = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"]
    image = SiglipConfig(
        image_size=math.isqrt(shapes["img/pos_embedding"][1]) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][2],
        output_dim=shapes["img/head/kernel"][1],
    )
    depth, num_heads, width, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    post_norms = "llm/layers/post_attention_norm/scale" in shapes
    text = GemmaConfig(
        width=width,
        depth=depth,
        mlp_dim=shapes["llm/layers/mlp/linear"][1],
        num_heads=num_heads,
        num_kv_heads=shapes["llm/layers/attn/kv_einsum/w"][2],
        head_dim=head_dim,
        query_scale=head_dim**-0.5,
        vocab_size=shapes["llm/embedder/input_embedding"][0],
        attn_logits_softcap=50.0 if post_norms else 0.0,
        post_norms=post_norms,
    )
    unknown = {"query_scale": text.query_scale, "attn_logits_softcap": text.attn_logits_softcap}
    for known in PRESETS.values():
        if dataclasses.replace(known.text, vocab_size=text.vocab_size, **unknown) == text:
            text = dataclasses.replace(known.text, vocab_size=text.vocab_size)
    return PaliGemmaConfig(
        image=image, text=dataclasses.replace(text, final_logits_softcap=final_logits_softcap)
    )
