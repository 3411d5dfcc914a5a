"""Folders as transformers writes them, made with struct, json and numpy alone, for tests to compare with.

The formulas are those of transformers' own conversion scripts: a linear layer holds (out, in), heads are flattened
before their size, a convolution holds (out, in, height, width), each layer's tensors are apart.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pgdist.models import PaliGemmaConfig
from pgdist.parameters import flatten
from pgdist.weights.transformers_config import to_json
from tests.models.small import random_parameters
from tests.weights.samples import BFLOAT16

_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
}
_DTYPES = {name: BFLOAT16 if name == "BF16" else np.dtype(dtype) for dtype, name in _NAMES.items()}
_BLOCK, _ATTENTION = "img/Transformer/encoderblock/", "MultiHeadDotProductAttention_0/"


def random_model(config: PaliGemmaConfig, dtype: np.dtype | type = np.float32, *, seed: int = 0):
    """{name: array} of the model, every number random."""
    flat = flatten(random_parameters(config, seed=seed))
    return {name: array.astype(dtype) for name, array in flat.items()}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], *, metadata: bool = True) -> Path:
    """One file; the data in the order of `tensors`."""
    header, data = ({"__metadata__": {"format": "pt"}} if metadata else {}), b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), end]
        }  # fmt: skip
        data += np.ascontiguousarray(array).tobytes()
    return write_raw(path, header, data)


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """The format's frame around any header: text, or what becomes JSON."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read_header(path: Path) -> dict[str, dict]:
    """The header of a file, as it is."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file."""
    header, content = read_header(path), path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of all files in a folder."""
    files = [read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))]
    merged = {name: array for file in files for name, array in file.items()}
    assert len(merged) == sum(map(len, files))
    return merged


def write_folder(
    folder: Path, config: PaliGemmaConfig, tensors: Mapping[str, np.ndarray], *, shards: int = 1
) -> Path:
    """config.json, and the tensors in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    content = to_json(config, dtype=next(iter(tensors.values())).dtype.name)
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        write_safetensors(
            folder / shard, {n: array for n, array in tensors.items() if weight_map[n] == shard}
        )
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def in_transformers(
    flat: Mapping[str, np.ndarray], config: PaliGemmaConfig, *, rows: int
) -> dict[str, np.ndarray]:
    """The model's arrays as transformers' tensors; `rows` of the embedding, those behind the vocabulary zero."""
    vision, connector = "vision_tower.vision_model.", "multi_modal_projector.linear."
    embedding = flat["llm/embedder/input_embedding"]
    padding = np.zeros((rows - len(embedding), embedding.shape[1]), embedding.dtype)
    tensors = {
        f"{vision}embeddings.patch_embedding.weight": flat["img/embedding/kernel"].transpose(3, 2, 0, 1),
        f"{vision}embeddings.patch_embedding.bias": flat["img/embedding/bias"],
        f"{vision}embeddings.position_embedding.weight": flat["img/pos_embedding"][0],
        f"{vision}post_layernorm.weight": flat["img/Transformer/encoder_norm/scale"],
        f"{vision}post_layernorm.bias": flat["img/Transformer/encoder_norm/bias"],
        f"{connector}weight": flat["img/head/kernel"].T,
        f"{connector}bias": flat["img/head/bias"],
        "language_model.model.embed_tokens.weight": np.concatenate([embedding, padding]),
        "language_model.model.norm.weight": flat["llm/final_norm/scale"],
    }
    for i in range(config.image.depth):
        layer = {name.removeprefix(_BLOCK): a[i] for name, a in flat.items() if name.startswith(_BLOCK)}
        tensors |= {f"{vision}encoder.layers.{i}.{name}": a for name, a in _image_layer(layer).items()}
    for i in range(config.text.depth):
        layer = {n.removeprefix("llm/layers/"): a[i] for n, a in flat.items() if n.startswith("llm/layers/")}
        tensors |= {f"language_model.model.layers.{i}.{name}": a for name, a in _text_layer(layer).items()}
    return tensors


def _image_layer(a: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {}
    for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        tensors |= {f"{theirs}.weight": a[f"{ours}/scale"], f"{theirs}.bias": a[f"{ours}/bias"]}
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel, bias = a[f"{_ATTENTION}{ours}/kernel"], a[f"{_ATTENTION}{ours}/bias"]
        tensors[f"self_attn.{theirs}.weight"] = kernel.reshape(len(kernel), -1).T
        tensors[f"self_attn.{theirs}.bias"] = bias.reshape(-1)
    out = a[f"{_ATTENTION}out/kernel"]
    tensors["self_attn.out_proj.weight"] = out.reshape(-1, out.shape[-1]).T
    tensors["self_attn.out_proj.bias"] = a[f"{_ATTENTION}out/bias"]
    for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        tensors[f"mlp.{theirs}.weight"] = a[f"MlpBlock_0/{ours}/kernel"].T
        tensors[f"mlp.{theirs}.bias"] = a[f"MlpBlock_0/{ours}/bias"]
    return tensors


def _text_layer(a: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = {
        "q_proj": a["attn/q_einsum/w"],
        "k_proj": a["attn/kv_einsum/w"][0],
        "v_proj": a["attn/kv_einsum/w"][1],
    }
    tensors = {
        f"self_attn.{name}.weight": w.transpose(0, 2, 1).reshape(-1, w.shape[1]) for name, w in heads.items()
    }
    out = a["attn/attn_vec_einsum/w"]
    tensors["self_attn.o_proj.weight"] = out.reshape(-1, out.shape[-1]).T
    tensors["mlp.gate_proj.weight"] = a["mlp/gating_einsum"][0].T
    tensors["mlp.up_proj.weight"] = a["mlp/gating_einsum"][1].T
    tensors["mlp.down_proj.weight"] = a["mlp/linear"].T
    tensors["input_layernorm.weight"] = a["pre_attention_norm/scale"]
    if "post_attention_norm/scale" in a:
        tensors["post_attention_layernorm.weight"] = a["post_attention_norm/scale"]
        tensors["pre_feedforward_layernorm.weight"] = a["pre_ffw_norm/scale"]
        tensors["post_feedforward_layernorm.weight"] = a["post_ffw_norm/scale"]
    else:
        tensors["post_attention_layernorm.weight"] = a["pre_ffw_norm/scale"]
    return tensors
