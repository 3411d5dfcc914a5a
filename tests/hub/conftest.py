"""A site with a model as the Hub and Kaggle have them, and the environment of a process that asks it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.hub.fetching import environment_for
from tests.hub.servers import Site, serving

WEIGHTS = random.Random(0).randbytes(300_000)

FILES = {
    "config.json": b'{"model_type": "paligemma"}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": (
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    ),
    "tokenizer.model": WEIGHTS[:5000],
    "preprocessor_config.json": b"{}",
    # Of these a transformers folder needs nothing.
    ".gitattributes": b"x",
    "README.md": b"x",
    "pytorch_model.bin": WEIGHTS,
    "flax_model.msgpack": WEIGHTS,
    "pt_224.npz": WEIGHTS[1:],
    "onnx/model.safetensors": WEIGHTS,
}
WANTED = {
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.model", "preprocessor_config.json",
}  # fmt: skip


@pytest.fixture
def site() -> Iterator[Site]:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("kagglehub")
    archives = {1: {"old.npz": WEIGHTS[:1000]}, 2: {"pt_224.f16.npz": WEIGHTS, "pt_224.f32.npz": WEIGHTS * 2}}
    with serving(Site(files=dict(FILES), archives=archives)) as found:
        yield found


@pytest.fixture
def environment(site, tmp_path) -> dict[str, str]:
    return environment_for(tmp_path, site.url)
