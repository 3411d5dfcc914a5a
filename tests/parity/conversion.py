"""Our parameter tree as a transformers PaliGemma: names, layer by layer, and the transposes between them.

Every entry is a permutation of axes, a split or a reshape, never arithmetic, so a gradient converts as its
parameter does. Both sides multiply the decoder's norms by (1 + scale), scale queries inside attention, scale
text embeddings by sqrt(D) and leave image features as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import transformers

from pgdist.models import PaliGemmaConfig
from tests.models.small import SMALL, with_text

CONFIGS = SMALL | {"paligemma2-capped": with_text(SMALL["paligemma2"], final_logits_softcap=30.0)}
_VISION, _LANGUAGE = "model.vision_tower", "model.language_model"


def build_transformers(
    config: PaliGemmaConfig, flat: Mapping[str, np.ndarray], *, attention: str = "eager"
) -> transformers.PaliGemmaForConditionalGeneration:
    """A float32 transformers model that holds our parameters.  attention: as transformers calls its kinds."""
    reference_config = transformers_config(config)
    reference_config._attn_implementation = attention
    model = transformers.PaliGemmaForConditionalGeneration(reference_config).float().eval()
    state = {name: torch.from_numpy(array) for name, array in to_transformers(flat).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    if missing != ["lm_head.weight"] or unexpected or not tied:
        raise AssertionError(f"conversion does not cover transformers' arrays: {missing=} {unexpected=}")
    return model


def transformers_config(config: PaliGemmaConfig) -> transformers.PaliGemmaConfig:
    """Our sizes under transformers' names; the image token is the first id beyond the vocabulary."""
    image, text = config.image, config.text
    decoder = {
        "model_type": "gemma",
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "intermediate_size": text.mlp_dim,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
    }
    if text.post_norms:
        # The sliding window stays at its default of 4096, far beyond these sequences.
        decoder |= {
            "model_type": "gemma2",
            "query_pre_attn_scalar": round(text.query_scale**-2),
            "attn_logit_softcapping": text.attn_logits_softcap or None,
            "final_logit_softcapping": text.final_logits_softcap or None,
        }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": image.width,
        "intermediate_size": image.mlp_dim,
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.num_heads,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "vision_use_head": False,
    }
    return transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=text.vocab_size,
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        projection_dim=text.width,
    )


def reference_inputs(
    config: PaliGemmaConfig, image: np.ndarray, text: np.ndarray, mask_ar: np.ndarray, mask_input: np.ndarray
) -> dict[str, torch.Tensor]:
    """uint8[B, S, S, 3] and int32[B, T] of ours as transformers' arguments; padding may stand anywhere."""
    prefix = ((0, 0), (config.image.num_tokens, 0))
    arrays = {
        "input_ids": np.pad(text, prefix, constant_values=config.text.vocab_size),
        "attention_mask": np.pad(mask_input, prefix, constant_values=1),
        "token_type_ids": np.pad(mask_ar, prefix),
    }
    inputs = {key: torch.from_numpy(array).long() for key, array in arrays.items()}
    pixels = (image.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)
    return inputs | {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels))}


def to_transformers(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"img/head/kernel": array, ...} of ours, or of their gradients, as transformers' {name: array}."""
    out = {
        f"{_VISION}.embeddings.patch_embedding.weight": flat["img/embedding/kernel"].transpose(3, 2, 0, 1),
        f"{_VISION}.embeddings.patch_embedding.bias": flat["img/embedding/bias"],
        f"{_VISION}.embeddings.position_embedding.weight": flat["img/pos_embedding"][0],
        f"{_VISION}.post_layernorm.weight": flat["img/Transformer/encoder_norm/scale"],
        f"{_VISION}.post_layernorm.bias": flat["img/Transformer/encoder_norm/bias"],
        "model.multi_modal_projector.linear.weight": flat["img/head/kernel"].T,
        "model.multi_modal_projector.linear.bias": flat["img/head/bias"],
        f"{_LANGUAGE}.embed_tokens.weight": flat["llm/embedder/input_embedding"],
        f"{_LANGUAGE}.norm.weight": flat["llm/final_norm/scale"],
    }
    for layer, arrays in enumerate(_layers(flat, "img/Transformer/encoderblock/")):
        out |= {f"{_VISION}.encoder.layers.{layer}.{name}": x for name, x in _image_layer(arrays).items()}
    for layer, arrays in enumerate(_layers(flat, "llm/layers/")):
        out |= {f"{_LANGUAGE}.layers.{layer}.{name}": x for name, x in _text_layer(arrays).items()}
    return {name: np.array(array, np.float32, order="C") for name, array in out.items()}


def _layers(flat: Mapping[str, np.ndarray], prefix: str) -> list[dict[str, np.ndarray]]:
    """The scanned arrays under the prefix, taken apart: one dictionary a layer."""
    scanned = {name.removeprefix(prefix): x for name, x in flat.items() if name.startswith(prefix)}
    (depth,) = {len(x) for x in scanned.values()}
    return [{name: x[layer] for name, x in scanned.items()} for layer in range(depth)]


def _image_layer(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    width = len(ours["LayerNorm_0/scale"])
    attention = "MultiHeadDotProductAttention_0"
    out_nhw = ours[f"{attention}/out/kernel"]
    out = {
        "self_attn.out_proj.weight": out_nhw.reshape(width, width).T,
        "self_attn.out_proj.bias": ours[f"{attention}/out/bias"],
    }
    for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        kernel_wnh, bias_nh = ours[f"{attention}/{name}/kernel"], ours[f"{attention}/{name}/bias"]
        out[f"self_attn.{theirs}.weight"] = kernel_wnh.reshape(width, width).T
        out[f"self_attn.{theirs}.bias"] = bias_nh.reshape(width)
    for theirs, name in (("layer_norm1", "LayerNorm_0"), ("layer_norm2", "LayerNorm_1")):
        out[f"{theirs}.weight"] = ours[f"{name}/scale"]
        out[f"{theirs}.bias"] = ours[f"{name}/bias"]
    for theirs, name in (("mlp.fc1", "MlpBlock_0/Dense_0"), ("mlp.fc2", "MlpBlock_0/Dense_1")):
        out[f"{theirs}.weight"] = ours[f"{name}/kernel"].T
        out[f"{theirs}.bias"] = ours[f"{name}/bias"]
    return out


def _text_layer(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    query_ndh, key_value_ckdh, out_nhd = (
        ours[f"attn/{name}/w"] for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
    )
    width = out_nhd.shape[-1]
    key_kdh, value_kdh = key_value_ckdh
    out = {
        "self_attn.q_proj.weight": query_ndh.transpose(0, 2, 1).reshape(-1, width),
        "self_attn.k_proj.weight": key_kdh.transpose(0, 2, 1).reshape(-1, width),
        "self_attn.v_proj.weight": value_kdh.transpose(0, 2, 1).reshape(-1, width),
        "self_attn.o_proj.weight": out_nhd.reshape(-1, width).T,
        "mlp.gate_proj.weight": ours["mlp/gating_einsum"][0].T,
        "mlp.up_proj.weight": ours["mlp/gating_einsum"][1].T,
        "mlp.down_proj.weight": ours["mlp/linear"].T,
        "input_layernorm.weight": ours["pre_attention_norm/scale"],
    }
    if "post_attention_norm/scale" not in ours:
        # Gemma 1 in transformers calls the norm before its MLP "post attention".
        return out | {"post_attention_layernorm.weight": ours["pre_ffw_norm/scale"]}
    return out | {
        "post_attention_layernorm.weight": ours["post_attention_norm/scale"],
        "pre_feedforward_layernorm.weight": ours["pre_ffw_norm/scale"],
        "post_feedforward_layernorm.weight": ours["post_ffw_norm/scale"],
    }
