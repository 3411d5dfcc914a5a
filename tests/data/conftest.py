"""Fixtures of the data tests: the repository's tiny tokenizer and small JSONL files with images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pgdist.data.jsonl import JsonlSource
from pgdist.data.tokenizer import Tokenizer
from tests.data.pictures import colour

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes lines (objects, or raw text or bytes) to a JSONL file in tmp_path and returns its path."""

    def write(*lines, name="data.jsonl") -> Path:
        encoded = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
        content = b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in encoded)
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def make_source(tmp_path, write_jsonl):
    """A source of n examples; the image of example i is filled with `colour(i)`."""

    def make(n: int, *, bad: dict[int, object] | None = None, suffixes: int = 1, **options) -> JsonlSource:
        lines = []
        for i in range(n):
            Image.new("RGB", (12, 8), colour(i)).save(tmp_path / f"{i}.png")
            suffix = [f"red circle {i} {j}" for j in range(suffixes)] if suffixes > 1 else f"red circle {i}"
            lines.append({"image": f"{i}.png", "prefix": f"caption en {i}", "suffix": suffix})
        for i, line in (bad or {}).items():
            lines[i] = line
        return JsonlSource(write_jsonl(*lines), **options)

    return make
