"""What the model sees of its first examples, written down for the report when the tokens are at hand."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from pgdist.data.jsonl import Record
from pgdist.data.loader import HostBatch
from pgdist.data.tokenizer import Tokenizer


def describe_examples(batch: HostBatch, tokenizer: Tokenizer, *, limit: int) -> list[dict[str, Any]]:
    """The first rows of a batch: image as the model gets it, texts, token pieces and their masks."""
    rows = []
    for row, record in enumerate(batch.records[:limit]):
        if not isinstance(record, Record):
            continue
        arrays = {name: array[row] for name, array in batch.arrays.items()}
        rows.append(
            {
                "image": _data_uri(arrays["image"]),
                "prefix": record.prefix,
                "suffix": record.suffix,
                "pieces": tokenizer.pieces(arrays["text"].tolist()),
                **{name: arrays[name].tolist() for name in ("mask_ar", "mask_loss", "mask_input")},
            }
        )
    return rows


def _data_uri(image: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
