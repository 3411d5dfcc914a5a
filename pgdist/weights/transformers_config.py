"""The files beside the weights of a transformers PaliGemma: config.json, both ways, and the processor's.

Published files leave out whatever equals the defaults of transformers' classes, so those defaults (the same from
version 4.47 to 5.23) stand here; transformers itself is not needed. What pgdist's model cannot do differently, such
as the base of its rotary embedding, is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from pgdist.errors import WeightsError
from pgdist.models import GemmaConfig, PaliGemmaConfig, SiglipConfig

_ROW_MULTIPLE = 64  # published embeddings are padded to a multiple of it
_MOST_PADDING = 256  # rows; more of them behind `<image>` are tokens that somebody has added
_LONGEST = 8192  # tokens, transformers' default of max_position_embeddings

_TOP_DEFAULTS = {"image_token_index": 256_000, "projection_dim": 2048}
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16,
}  # fmt: skip
_TEXT_DEFAULTS = {
    "gemma": {
        "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "final_logit_softcapping": None,
    },
    "gemma2": {
        "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip

# {key: what it may be if it is there}. "gelu" is what early Gemma files say for the tanh that they mean.
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_VISION_FIXED = {"hidden_act": _TANH_GELU, "layer_norm_eps": (1e-6,), "num_channels": (3,)}
_TEXT_FIXED = {
    "hidden_act": (*_TANH_GELU, "gelu", None),
    "hidden_activation": (*_TANH_GELU, None),
    "rms_norm_eps": (1e-6,),
    "rope_theta": (10_000.0,),
    "rope_scaling": (None,),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
}
_ROPE_FIXED = {"rope_theta": (10_000.0,), "rope_type": ("default",)}

IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def padded_vocab_size(config: PaliGemmaConfig) -> int:
    """Rows of the embedding as published: the vocabulary, `<image>`, and padding to a multiple of 64."""
    return -(-(config.text.vocab_size + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE


def to_json(config: PaliGemmaConfig, *, dtype: str) -> dict[str, Any]:
    """The content of config.json for the model in `dtype` ("bfloat16", ...), for transformers 4.47 and newer.

    transformers windows every other Gemma 2 layer at 4,096 tokens, pgdist none: so each layer is declared to be of
    full attention, and, for versions that do not read this, the window is as long as the longest text.

    Raises WeightsError if transformers has no such model.
    """
    image, text = config.image, config.text
    rows = padded_vocab_size(config)
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": text.width,
        "ignore_index": -100,
        "image_token_index": text.vocab_size,
        "projection_dim": image.output_dim,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vocab_size": rows,
        "text_config": {
            **_decoder_kind(text),
            "hidden_size": text.width,
            "intermediate_size": text.mlp_dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "num_image_tokens": image.num_tokens,
            "torch_dtype": dtype,
            "vocab_size": rows,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": image.width,
            "image_size": image.image_size,
            "intermediate_size": image.mlp_dim,
            "num_attention_heads": image.num_heads,
            "num_hidden_layers": image.depth,
            "num_image_tokens": image.num_tokens,
            "patch_size": image.patch_size,
            "projection_dim": image.output_dim,
            "torch_dtype": dtype,
            "vision_use_head": False,
        },
    }


def from_json(content: Mapping[str, Any], *, path: object) -> PaliGemmaConfig:
    """The model of a config.json, of PaliGemma 1 or 2, as published or as any transformers since has written it.

    Soft-caps are those of the file, and no layer has a sliding window, whatever the file says. The vocabulary ends
    at `<image>`: what is behind it in the embedding is padding.

    path: of the file, for messages.  Raises WeightsError where it is another model's, or one that pgdist lacks.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: is a {type(content).__name__}, expected an object. Download it again.")
    top = _Section(content=content, defaults=_TOP_DEFAULTS, prefix="", path=path)
    top.check_kind("paligemma")
    top.check({"tie_word_embeddings": (True,)})
    text = _text_config(top)
    image = _image_config(top, output_dim=text.width)
    if (found := top.size("projection_dim")) != text.width:
        raise top.error("projection_dim", found, f"{text.width}, as text_config.hidden_size")
    return PaliGemmaConfig(image=image, text=text)


def write_processor_files(
    folder: Path, *, config: PaliGemmaConfig, tokenizer: Path | None, source: Path | None
) -> None:
    """What AutoProcessor, AutoTokenizer and `generate` need beside the weights, for the same ids and pixels as here.

    source: a transformers folder that the weights came from, whose tokenizer files are copied if it has them.
    tokenizer: the SentencePiece model that they are made from otherwise; transformers then needs sentencepiece and
    protobuf to load it. None: no tokenizer files.

    Raises WeightsError if `tokenizer` is none, or has more pieces than the model embeds.
    """
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    if source is not None and any((source / name).is_file() for name in TOKENIZER_FILES[:2]):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif tokenizer is not None:
        pieces = _read_pieces(tokenizer)
        special = {
            f"{kind}_token_id": max(0, getattr(pieces, f"{kind}_id")()) for kind in ("bos", "eos", "pad")
        }
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        _write_json(
            folder / "tokenizer_config.json",
            _tokenizer_config(pieces, image_token=config.text.vocab_size, path=tokenizer),
        )
    # The rows behind the vocabulary have logits too, which `generate` must not choose.
    unused = list(range(config.text.vocab_size, padded_vocab_size(config)))
    _write_json(folder / "generation_config.json", {**special, "suppress_tokens": unused})
    _write_json(folder / "preprocessor_config.json", _image_processor_config(config.image))


def _image_processor_config(c: SiglipConfig) -> dict[str, Any]:
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": c.num_tokens,
        "size": {"height": c.image_size, "width": c.image_size},
        "do_convert_rgb": True,
        "do_resize": True,
        # Pillow's number of bilinear, with which pgdist resizes; published files say bicubic, 3.
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _tokenizer_config(
    pieces: sentencepiece.SentencePieceProcessor, *, image_token: int, path: Path
) -> dict[str, Any]:
    count = pieces.vocab_size()
    if count > image_token:
        raise WeightsError(
            f"{path}: has {count} pieces, the model embeds {image_token}: they do not belong together. "
            "Give the tokenizer.model of the weights."
        )
    # transformers numbers added tokens in turn: ids without a piece get one, so that `<image>` has the next id.
    added = {i: f"<no_piece_{i}>" for i in range(count, image_token)} | {image_token: IMAGE_TOKEN}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {f"{kind}_token": getattr(pieces, f"{kind}_id")() for kind in ("bos", "eos", "pad", "unk")}
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        **{key: pieces.id_to_piece(max(0, i)) for key, i in named.items()},
        # Without a piece of its own, the default "<mask>" would be added, and take the id of `<image>`.
        "mask_token": None,
        "added_tokens_decoder": {str(i): {"content": name, **plain} for i, name in added.items()},
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
    }


def _read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: cannot be read as a SentencePiece model: {error}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _decoder_kind(c: GemmaConfig) -> dict[str, Any]:
    """model_type and what only this type of decoder has."""
    final = {"final_logit_softcapping": c.final_logits_softcap or None}
    if not c.post_norms:
        if c.attn_logits_softcap or abs(c.query_scale * c.head_dim**0.5 - 1) > 1e-6:
            raise WeightsError(
                "transformers has no decoder without post-norms that caps attention logits or scales queries by "
                f"other than head_dim^-0.5 (here: soft-cap {c.attn_logits_softcap}, scale {c.query_scale}, head_dim "
                f"{c.head_dim}). Write the published layout (.npz) instead."
            )
        return {"model_type": "gemma", **(final if c.final_logits_softcap else {})}
    scalar = round(c.query_scale**-2)
    if abs(c.query_scale * scalar**0.5 - 1) > 1e-6:
        raise WeightsError(
            f"transformers scales queries by the root of a whole number, not by {c.query_scale}. Write the published "
            "layout (.npz) instead."
        )
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": c.attn_logits_softcap or None,
        **final,
        "layer_types": ["full_attention"] * c.depth,
        "sliding_window": _LONGEST,
        "max_position_embeddings": _LONGEST,
    }


def _text_config(top: _Section) -> GemmaConfig:
    kind = top.section("text_config", defaults={}).check_kind(*_TEXT_DEFAULTS)
    section = top.section("text_config", defaults=_TEXT_DEFAULTS[kind])
    section.check(_TEXT_FIXED)
    if section.content.get("rope_parameters") is not None:
        section.section("rope_parameters", defaults={}).check(_ROPE_FIXED)
    gemma2 = kind == "gemma2"
    head_dim = section.size("head_dim")
    heads, kv_heads = section.size("num_attention_heads"), section.size("num_key_value_heads")
    if heads % kv_heads:
        raise section.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    return GemmaConfig(
        width=section.size("hidden_size"),
        depth=section.size("num_hidden_layers"),
        mlp_dim=section.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        query_scale=(section.size("query_pre_attn_scalar") if gemma2 else head_dim) ** -0.5,
        vocab_size=_vocab_size(top, section),
        attn_logits_softcap=section.number("attn_logit_softcapping") if gemma2 else 0.0,
        final_logits_softcap=section.number("final_logit_softcapping"),
        post_norms=gemma2,
    )


def _vocab_size(top: _Section, section: _Section) -> int:
    image_token, rows = top.size("image_token_index"), section.size("vocab_size")
    if rows - image_token > _MOST_PADDING:
        raise top.error(
            "image_token_index",
            image_token,
            f"the last token of all, with at most {_MOST_PADDING} rows from it on (text_config.vocab_size is {rows})",
        )
    return min(image_token, rows)


def _image_config(top: _Section, *, output_dim: int) -> SiglipConfig:
    section = top.section("vision_config", defaults=_VISION_DEFAULTS)
    section.check_kind("siglip_vision_model")
    section.check(_VISION_FIXED)
    width, heads = section.size("hidden_size"), section.size("num_attention_heads")
    if width % heads:
        raise section.error("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    return SiglipConfig(
        image_size=section.size("image_size"),
        patch_size=section.size("patch_size"),
        width=width,
        depth=section.size("num_hidden_layers"),
        num_heads=heads,
        mlp_dim=section.size("intermediate_size"),
        output_dim=output_dim,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """A JSON object, with its defaults and where it stands: what is wrong in it is named by file and key."""

    content: Mapping[str, Any]
    defaults: Mapping[str, Any]
    prefix: str
    path: object

    def error(self, key: str, found: object, expected: str) -> WeightsError:
        return WeightsError(
            f"{self.path}: {self.prefix}{key} is {found!r}, expected {expected}. "
            "pgdist reads PaliGemma 1 and 2 as transformers writes them."
        )

    def mapping(self, key: str) -> Mapping[str, Any]:
        found = self.content.get(key)
        if not isinstance(found, Mapping):
            raise self.error(key, found, "an object")
        return found

    def section(self, key: str, *, defaults: Mapping[str, Any]) -> _Section:
        return _Section(
            content=self.mapping(key), defaults=defaults, prefix=f"{self.prefix}{key}.", path=self.path
        )

    def check_kind(self, *kinds: str) -> str:
        """model_type, one of `kinds`; in a part that does not say it, the first of them."""
        found = self.content.get("model_type", kinds[0] if self.prefix else None)
        if found not in kinds:
            raise self.error("model_type", found, " or ".join(map(repr, kinds)))
        return found

    def check(self, fixed: Mapping[str, Sequence[Any]]) -> None:
        """Raises where a key says other than what pgdist's model does."""
        for key, allowed in fixed.items():
            if key in self.content and self.content[key] not in allowed:
                raise self.error(key, self.content[key], repr(allowed[0]))

    def size(self, key: str) -> int:
        """A whole number above 0; of a pair of equal ones, [224, 224], the one."""
        found = self.content.get(key, self.defaults[key])
        if isinstance(found, list | tuple) and len(found) == 2 and found[0] == found[1]:
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
            raise self.error(key, found, "a whole number above 0")
        return found

    def number(self, key: str) -> float:
        """A number above 0, or 0 for null."""
        found = self.content.get(key, self.defaults[key])
        if found is None:
            return 0.0
        if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
            raise self.error(key, found, "a number above 0")
        return found
