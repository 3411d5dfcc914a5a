"""Model FLOPs of a training example, in closed form from the sizes of the model: what MFU counts.

The convention. A product of [m, k] and [k, n] is 2mnk FLOPs; nothing but matrix products counts. Forward and backward
pass are counted, recomputation is not: it is no use to the model. Frozen weights have no weight gradients. Gradients
of activations stop at the first thing that trains: a frozen image tower has none. A stack of equal layers is charged
alike in each layer, as the scan that runs it does, if anything in it trains. Attention is N x N, not halved where a
mask hides keys. Padding counts like text, and vocabulary logits exist for the scored positions alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from pgdist.models.gemma import GemmaConfig
from pgdist.models.paligemma import PaliGemmaConfig
from pgdist.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    """Forward FLOPs of a part of the model, of all its layers.

    prefix: of the names of its parameters.  weights: of the product with each weight, by name after the prefix.
    attention: of the products of two activations.  is_stack: layers that are scanned.
    """

    prefix: str
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    attention: float = 0.0
    is_stack: bool = False


def training_flops(
    config: PaliGemmaConfig, *, text_length: int, max_scored_positions: int = 0, trainable: Collection[str]
) -> float:
    """FLOPs of the forward and backward pass of one example, by the convention above.

    text_length: `config.data.text_length`, of which the decoder reads all but the last token.  max_scored_positions:
    as `pgdist.train.objective.batch_loss` takes it, 0 for all.  trainable: names of the parameters that train.
    """
    text = text_length - 1
    scored = min(text, max_scored_positions) if max_scored_positions else text
    flops, earlier_trains = 0.0, False
    for stage in _stages(config, text=text, scored=scored):
        trained = {name.removeprefix(stage.prefix) for name in trainable if name.startswith(stage.prefix)}
        products = sum(stage.weights.values())
        flops += products + stage.attention
        if earlier_trains or (stage.is_stack and trained):
            flops += products + 2 * stage.attention  # both factors of attention's products are activations
        flops += sum(found for name, found in stage.weights.items() if name in trained)
        earlier_trains |= bool(trained)
    return flops


def _stages(config: PaliGemmaConfig, *, text: int, scored: int) -> list[_Stage]:
    """In the order of the forward pass.  text, scored: tokens that are read, and that are scored."""
    image, decoder = config.image, config.text
    tokens = image.num_tokens
    patches = 2 * tokens * image.patch_size**2 * 3 * image.width
    logits = 2 * scored * decoder.width * decoder.vocab_size
    return [
        _Stage(prefix="img/embedding/", weights={"kernel": patches}),
        _Stage(prefix="img/pos_embedding"),
        _image_layers(image),
        _Stage(prefix="img/Transformer/encoder_norm/"),
        _Stage(prefix="img/head/", weights={"kernel": 2 * tokens * image.width * image.output_dim}),
        _Stage(prefix="llm/embedder/"),  # a look-up
        _text_layers(decoder, tokens=tokens + text),
        _Stage(prefix="llm/final_norm/"),
        _Stage(prefix="llm/embedder/", weights={"input_embedding": logits}),
    ]


def _image_layers(config: SiglipConfig) -> _Stage:
    tokens = config.num_tokens
    square = 2.0 * config.depth * tokens * config.width**2
    dense = 2.0 * config.depth * tokens * config.width * config.mlp_dim
    projections = {
        f"MultiHeadDotProductAttention_0/{name}/kernel": square for name in ("query", "key", "value", "out")
    }
    return _Stage(
        prefix="img/Transformer/encoderblock/",
        weights=projections | {f"MlpBlock_0/Dense_{number}/kernel": dense for number in (0, 1)},
        attention=4.0 * config.depth * tokens**2 * config.width,
        is_stack=True,
    )


def _text_layers(config: GemmaConfig, *, tokens: int) -> _Stage:
    a_weight = 2.0 * config.depth * tokens * config.width
    queries = a_weight * config.num_heads * config.head_dim
    return _Stage(
        prefix="llm/layers/",
        weights={
            "attn/q_einsum/w": queries,
            "attn/kv_einsum/w": 2 * a_weight * config.num_kv_heads * config.head_dim,
            "attn/attn_vec_einsum/w": queries,
            "mlp/gating_einsum": 2 * a_weight * config.mlp_dim,
            "mlp/linear": a_weight * config.mlp_dim,
        },
        attention=4.0 * config.depth * tokens**2 * config.num_heads * config.head_dim,
        is_stack=True,
    )
