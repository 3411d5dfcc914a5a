"""Every published size by name, and `tiny`, the size of the model that the repository carries.

Figures: PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555), and the published implementation's
variants.
"""

from __future__ import annotations

import dataclasses
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
