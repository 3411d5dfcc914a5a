"""Names: how the tensors of a transformers checkpoint map to the arrays of the model.

transformers stores every layer apart and most matrices transposed; `tensors` says of each tensor which block of
which model array it is. Names are those of the published files (`language_model.model.layers.0...`), which every
version of transformers loads. Files that newer versions wrote, and a Gemma decoder or a SigLIP tower alone, name the
same tensors otherwise: `model_arrays` takes them all to the published names first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pgdist.errors import WeightsError
from pgdist.models import GemmaConfig, PaliGemmaConfig, SiglipConfig
from pgdist.weights.array_info import ArrayInfo, common_dtype
from pgdist.weights.mismatch import check_fits
from pgdist.weights.pieces import ModelArray, Piece

_TEXT, _IMAGE, _CONNECTOR = "language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."
_EMBEDDING = _TEXT + "embed_tokens.weight"
_MODEL_EMBEDDING = "llm/embedder/input_embedding"

# In front of the tensors' own names in published files, and what may stand in front of them elsewhere.
_NAMES = {
    _TEXT: re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm)\..+)"),
    _IMAGE: re.compile(
        r"(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?((?:embeddings|encoder|post_layernorm)\..+)"
    ),
    _CONNECTOR: re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"),
}
_TIED = re.compile(r"(?:model\.)?(?:language_model\.)?lm_head\.weight")
# Constants that some versions stored, and what a whole SigLIP has besides the image encoder.
_CONSTANTS = re.compile(r".*\.(?:position_ids|rotary_emb\.inv_freq)")
_REST_OF_SIGLIP = re.compile(r"(?:vision_model\.)?head\..*|text_model\..*|logit_(?:scale|bias)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a transformers checkpoint: its shape there, and of which array of the model it is which piece."""

    shape: tuple[int, ...]
    model_name: str
    piece: Piece


class _Entry(NamedTuple):
    """A line of the tables below. index, view and axes are a Piece's; a view of None is the stored shape."""

    name: str
    shape: tuple[int, ...]
    model_name: str
    axes: tuple[int, ...]
    view: tuple[int, ...] | None = None
    index: tuple[int, ...] = ()


def tensors(config: PaliGemmaConfig, *, padded_vocab_size: int) -> dict[str, Tensor]:
    """Every tensor of the checkpoint under its published name, in the order of transformers' modules.

    padded_vocab_size: rows of the stored embedding, at least the model's vocab_size. Those beyond are no part of
    the model (`<image>` and padding): the embedding's piece does not cover them.
    """
    entries = (
        _image_entries(config.image)
        + _connector_entries(config)
        + _text_entries(config.text, padded_vocab_size)
    )
    return {entry.name: _tensor(entry) for entry in entries}


def model_arrays(
    stored: Iterable[ArrayInfo], config: PaliGemmaConfig, *, path: object
) -> dict[str, ModelArray]:
    """The model's arrays, each with the pieces that it is made of, both in the order of the file.

    stored: what the file (all of its shards) lists, under any of the names that transformers has used.
    config: sizes of the model that the file holds, from the config.json beside it.

    A file that holds a decoder or an image encoder alone gives the arrays of that part alone; such a decoder may
    have a smaller vocabulary, and its embedding then fewer rows. An array whose layers differ in dtype gets the
    narrowest dtype that holds all of them exactly.

    Raises WeightsError if tensors are missing, unknown, of another shape or no floating-point numbers.
    """
    found = _by_published_name(stored, path=path)
    table = tensors(config, padded_vocab_size=_stored_rows(found, config))
    parts = _parts(found)
    expected = {
        name: ArrayInfo(name=name, shape=tensor.shape, dtype=np.dtype(np.float32))
        for name, tensor in table.items()
        if name.startswith(parts)
    }
    check_fits(found, expected=expected, path=path, hint=_hint(found))
    members: dict[str, list[tuple[ArrayInfo, Piece]]] = {}
    for name, info in found.items():
        piece = dataclasses.replace(table[name].piece, stored_name=info.name)
        members.setdefault(table[name].model_name, []).append((info, piece))
    return {name: _model_array(name, pieces, config=config) for name, pieces in members.items()}


def _tensor(entry: _Entry) -> Tensor:
    view = entry.view or entry.shape
    piece = Piece(
        stored_name=entry.name, index=entry.index, view=view, axes=entry.axes, start=(0,) * len(view)
    )
    return Tensor(shape=entry.shape, model_name=entry.model_name, piece=piece)


def _image_entries(c: SiglipConfig) -> list[_Entry]:
    p, n, width = c.patch_size, c.num_tokens, c.width
    patches, positions = "embeddings.patch_embedding", "embeddings.position_embedding"
    entries = [
        _Entry(f"{patches}.weight", (width, 3, p, p), "embedding/kernel", (2, 3, 1, 0)),
        _Entry(f"{patches}.bias", (width,), "embedding/bias", (0,)),
        _Entry(f"{positions}.weight", (n, width), "pos_embedding", (0, 1), index=(0,)),
    ]
    for layer in range(c.depth):
        entries += [
            entry._replace(
                name=f"encoder.layers.{layer}.{entry.name}",
                model_name=f"Transformer/encoderblock/{entry.model_name}",
                index=(layer,),
            )
            for entry in _image_layer(c)
        ]
    entries += _layer_norm("post_layernorm", "Transformer/encoder_norm", width=width)
    return _prefixed(entries, name=_IMAGE, model_name="img/")


def _image_layer(c: SiglipConfig) -> list[_Entry]:
    width, heads, mlp_dim = c.width, c.num_heads, c.mlp_dim
    head_dim = width // heads
    attention = "MultiHeadDotProductAttention_0"
    entries = _layer_norm("layer_norm1", "LayerNorm_0", width=width)
    rows, columns = (heads, head_dim, width), (width, heads, head_dim)
    for name, ours in (("k_proj", "key"), ("v_proj", "value"), ("q_proj", "query")):
        entries += [
            _Entry(f"self_attn.{name}.weight", (width, width), f"{attention}/{ours}/kernel", (2, 0, 1), rows),
            _Entry(f"self_attn.{name}.bias", (width,), f"{attention}/{ours}/bias", (0, 1), rows[:2]),
        ]
    return [
        *entries,
        _Entry("self_attn.out_proj.weight", (width, width), f"{attention}/out/kernel", (1, 2, 0), columns),
        _Entry("self_attn.out_proj.bias", (width,), f"{attention}/out/bias", (0,)),
        *_layer_norm("layer_norm2", "LayerNorm_1", width=width),
        _Entry("mlp.fc1.weight", (mlp_dim, width), "MlpBlock_0/Dense_0/kernel", (1, 0)),
        _Entry("mlp.fc1.bias", (mlp_dim,), "MlpBlock_0/Dense_0/bias", (0,)),
        _Entry("mlp.fc2.weight", (width, mlp_dim), "MlpBlock_0/Dense_1/kernel", (1, 0)),
        _Entry("mlp.fc2.bias", (width,), "MlpBlock_0/Dense_1/bias", (0,)),
    ]


def _layer_norm(name: str, model_name: str, *, width: int) -> list[_Entry]:
    return [
        _Entry(f"{name}.weight", (width,), f"{model_name}/scale", (0,)),
        _Entry(f"{name}.bias", (width,), f"{model_name}/bias", (0,)),
    ]


def _connector_entries(config: PaliGemmaConfig) -> list[_Entry]:
    out, width = config.image.output_dim, config.image.width
    return [
        _Entry(_CONNECTOR + "linear.weight", (out, width), "img/head/kernel", (1, 0)),
        _Entry(_CONNECTOR + "linear.bias", (out,), "img/head/bias", (0,)),
    ]


def _text_entries(c: GemmaConfig, rows: int) -> list[_Entry]:
    entries = [_Entry("embed_tokens.weight", (rows, c.width), "embedder/input_embedding", (0, 1))]
    for layer in range(c.depth):
        entries += [
            entry._replace(
                name=f"layers.{layer}.{entry.name}",
                model_name=f"layers/{entry.model_name}",
                index=(layer, *entry.index),
            )
            for entry in _text_layer(c)
        ]
    entries += [_Entry("norm.weight", (c.width,), "final_norm/scale", (0,))]
    return _prefixed(entries, name=_TEXT, model_name="llm/")


def _text_layer(c: GemmaConfig) -> list[_Entry]:
    """Both halves of `kv_einsum` and of `gating_einsum` are tensors of their own; their index says which half."""
    width, mlp_dim, n, k, h = c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    # Gemma 1 in transformers calls the norm before its MLP "post attention".
    norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"}
    if c.post_norms:
        norms |= {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "pre_ffw_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    heads, kv_heads = (n, h, width), (k, h, width)
    return [
        _Entry("self_attn.q_proj.weight", (n * h, width), "attn/q_einsum/w", (0, 2, 1), heads),
        _Entry("self_attn.k_proj.weight", (k * h, width), "attn/kv_einsum/w", (0, 2, 1), kv_heads, (0,)),
        _Entry("self_attn.v_proj.weight", (k * h, width), "attn/kv_einsum/w", (0, 2, 1), kv_heads, (1,)),
        _Entry("self_attn.o_proj.weight", (width, n * h), "attn/attn_vec_einsum/w", (1, 2, 0), (width, n, h)),
        _Entry("mlp.gate_proj.weight", (mlp_dim, width), "mlp/gating_einsum", (1, 0), index=(0,)),
        _Entry("mlp.up_proj.weight", (mlp_dim, width), "mlp/gating_einsum", (1, 0), index=(1,)),
        _Entry("mlp.down_proj.weight", (width, mlp_dim), "mlp/linear", (1, 0)),
        *(_Entry(f"{name}.weight", (width,), f"{ours}/scale", (0,)) for name, ours in norms.items()),
    ]


def _prefixed(entries: list[_Entry], *, name: str, model_name: str) -> list[_Entry]:
    return [e._replace(name=name + e.name, model_name=model_name + e.model_name) for e in entries]


def _by_published_name(stored: Iterable[ArrayInfo], *, path: object) -> dict[str, ArrayInfo]:
    """{published name: the tensor under its own name}, in the file's order, without what is no parameter."""
    found: dict[str, ArrayInfo] = {}
    tied: ArrayInfo | None = None
    for info in stored:
        if _CONSTANTS.fullmatch(info.name):
            continue
        if _TIED.fullmatch(info.name):
            tied = info
            continue
        name = _published_name(info.name)
        if name in found:
            raise WeightsError(
                f"{path}: {found[name].name!r} and {info.name!r} are both {name!r} of the model. "
                "Write the file again with one of them."
            )
        found[name] = info
    if tied is not None:
        found.setdefault(_EMBEDDING, tied)
    if _parts(found) == (_IMAGE,):
        found = {name: info for name, info in found.items() if not _REST_OF_SIGLIP.fullmatch(name)}
    return found


def _published_name(name: str) -> str:
    for prefix, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            return prefix + match[1]
    return name


def _parts(found: Mapping[str, ArrayInfo]) -> tuple[str, ...]:
    """The prefixes of the parts that the file is to hold: of all three, unless it has the tensors of one alone."""
    present = tuple(prefix for prefix in (_TEXT, _IMAGE) if any(name.startswith(prefix) for name in found))
    connected = any(name.startswith(_CONNECTOR) for name in found)
    return present if len(present) == 1 and not connected else (_TEXT, _IMAGE, _CONNECTOR)


def _stored_rows(found: Mapping[str, ArrayInfo], config: PaliGemmaConfig) -> int:
    """Rows that the stored embedding may have: as many as it has, but no fewer than the model's if it is whole."""
    shape = found[_EMBEDDING].shape if _EMBEDDING in found else ()
    rows = shape[0] if len(shape) == 2 else 0
    return rows if rows and _parts(found) == (_TEXT,) else max(rows, config.text.vocab_size)


def _hint(found: Mapping[str, ArrayInfo]) -> str:
    if any("lora_" in name for name in found):
        return "These are LoRA adapters: merge them into their model (PEFT's merge_and_unload) and save that."
    return ""


def _model_array(name: str, members: list[tuple[ArrayInfo, Piece]], *, config: PaliGemmaConfig) -> ModelArray:
    pieces = tuple(piece for _, piece in members)
    lead = tuple(max(at) + 1 for at in zip(*(piece.index for piece in pieces), strict=True))
    block = tuple(pieces[0].view[axis] for axis in pieces[0].axes)
    if name == _MODEL_EMBEDDING:
        block = (min(block[0], config.text.vocab_size), *block[1:])
    dtype = common_dtype({info.dtype for info, _ in members})
    return ModelArray(info=ArrayInfo(name=name, shape=lead + block, dtype=dtype), pieces=pieces)
