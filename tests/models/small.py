"""Small models with every parameter random, and batches of unequal texts, for tests that look at numbers.

Nothing is left at zero or one: a connector, bias or norm at its initial value would hide a misplaced array.
Weights are normal with standard deviation fan_in^-0.5, so that activations, attention logits and vocabulary
logits are of order 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import traverse_util

from pgdist.models import GemmaConfig, PaliGemmaConfig, SiglipConfig, parameter_shapes

PAD, EOS, BOS = 0, 1, 2
FIRST_WORD = 3

# Sizes that cannot be mistaken for one another: a swapped axis gives a wrong shape, or wrong numbers.
_IMAGE = SiglipConfig(image_size=56, patch_size=14, width=48, depth=3, num_heads=3, mlp_dim=80, output_dim=72)
_TEXT = GemmaConfig(
    width=72,
    depth=3,
    mlp_dim=112,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    query_scale=32**-0.5,
    vocab_size=320,
)
SMALL = {
    "paligemma": PaliGemmaConfig(image=_IMAGE, text=_TEXT),
    # Query scale (D/N)^-0.5 as in the 27B, where it differs from H^-0.5.
    "paligemma2": PaliGemmaConfig(
        image=_IMAGE,
        text=dataclasses.replace(
            _TEXT, num_kv_heads=2, query_scale=18**-0.5, attn_logits_softcap=50.0, post_norms=True
        ),
    ),
}


def with_text(config: PaliGemmaConfig, **fields: object) -> PaliGemmaConfig:
    """The config with other fields in its decoder."""
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def with_image(config: PaliGemmaConfig, **fields: object) -> PaliGemmaConfig:
    """The config with other fields in its image tower."""
    return dataclasses.replace(config, image=dataclasses.replace(config.image, **fields))


def flat_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Parameter names, joined by "/", and shapes."""
    leaves = traverse_util.flatten_dict(parameter_shapes(config), sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def random_parameters(config: PaliGemmaConfig, *, seed: int) -> dict:
    """The nested parameter tree, float32 numpy arrays, every one of them random."""
    rng = np.random.default_rng(seed)
    flat = {
        name: _random_array(rng, name=name, shape=shape)
        for name, shape in sorted(flat_shapes(config).items())
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def _random_array(rng: np.random.Generator, *, name: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = name.rsplit("/", 1)[-1]
    center, std = 0.0, 0.3
    if name == "llm/final_norm/scale":
        # 1 + scale of either sign: with its tied head, a random model else only repeats the last token.
        center, std = -1.0, 1.0
    elif kind == "scale":
        # LayerNorm multiplies by its scale, RMSNorm by 1 + scale.
        center = 1.0 if name.startswith("img/") else 0.0
    elif kind != "bias":
        std = _fan_in(name, shape) ** -0.5
    return (center + std * rng.standard_normal(shape)).astype(np.float32)


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if name.endswith(("embedding/kernel", "attn_vec_einsum/w", "/out/kernel")):
        return int(np.prod(shape[-3:-1] if len(shape) == 4 and "embedding" not in name else shape[:-1]))
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return shape[1]
    if name.endswith(("input_embedding", "pos_embedding")):
        return shape[-1]
    return shape[-2]  # einsum `w`, MLP weights, dense kernels, the connector


def random_batch(
    config: PaliGemmaConfig, *, prefixes: Sequence[int], suffixes: Sequence[int], length: int, seed: int
) -> dict[str, np.ndarray]:
    """A batch of rows (`pgdist.data`), one for each prefix and suffix length; BOS and EOS are counted in.

    Texts have no token 0 but padding: transformers keeps that row of the embedding from being learnt.
    """
    rng = np.random.default_rng(seed)
    size, rows = config.image.image_size, len(prefixes)
    text = np.full((rows, length), PAD, np.int32)
    mask_ar, mask_input = np.zeros_like(text), np.zeros_like(text)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        end = prefix + suffix
        text[row, :end] = rng.integers(FIRST_WORD, config.text.vocab_size, end)
        text[row, 0] = BOS
        if suffix:
            text[row, end - 1] = EOS
        mask_ar[row, prefix:end] = 1
        mask_input[row, :end] = 1
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
        "text": text,
        "mask_ar": mask_ar,
        "mask_loss": mask_ar.copy(),
        "mask_input": mask_input,
        "weight": np.ones(rows, np.float32),
        "truncated": np.zeros(rows, np.float32),
    }
