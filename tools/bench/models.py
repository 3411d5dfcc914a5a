"""Models that a CPU runs in little time, between the tiny one and the published ones."""

from __future__ import annotations

from pgdist.models import GemmaConfig, PaliGemmaConfig, SiglipConfig
from pgdist.models.presets import PRESETS


def _like_3b(*, shrink: int, depth: int, vocab_size: int, image_size: int) -> PaliGemmaConfig:
    """PaliGemma 3B with narrower and fewer layers; head sizes as published."""
    text = GemmaConfig(
        width=2048 // shrink, depth=depth, mlp_dim=16_384 // shrink, num_heads=8 // shrink, num_kv_heads=1,
        head_dim=256, query_scale=256**-0.5, vocab_size=vocab_size,
    )  # fmt: skip
    image = SiglipConfig(
        image_size=image_size, patch_size=14, width=1152 // shrink, depth=depth, num_heads=16 // shrink,
        mlp_dim=4304 // shrink, output_dim=text.width,
    )  # fmt: skip
    return PaliGemmaConfig(image=image, text=text)


FOR_CPU = {
    "tiny": PRESETS["tiny"],
    "small": _like_3b(shrink=8, depth=4, vocab_size=8192, image_size=112),
    "medium": _like_3b(shrink=4, depth=6, vocab_size=32_128, image_size=224),
}
