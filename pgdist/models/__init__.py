"""SigLIP, Gemma and PaliGemma in flax linen, with the published checkpoint's parameter tree; see `presets`
for sizes.
"""

from pgdist.models.gemma import Gemma, GemmaConfig
from pgdist.models.paligemma import PaliGemma, PaliGemmaConfig, normalize_image, parameter_shapes
from pgdist.models.presets import PRESETS, preset
from pgdist.models.siglip import Siglip, SiglipConfig

__all__ = [
    "PRESETS",
    "Gemma",
    "GemmaConfig",
    "PaliGemma",
    "PaliGemmaConfig",
    "Siglip",
    "SiglipConfig",
    "normalize_image",
    "parameter_shapes",
    "preset",
]
