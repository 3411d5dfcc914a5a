"""Where weights come from: one view of whatever format, place or number of files they are in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping

import numpy as np

from pgdist.models.paligemma import PaliGemmaConfig
from pgdist.weights import boxes
from pgdist.weights.boxes import Box
from pgdist.weights.pieces import ModelArray
from pgdist.weights.stored import Block, StoredArray

CONFIG = "config.json"
_READ_SIZE = 2 * 2**20  # elements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that can be read, under the model's names and in the order of the file.

    stored: what the pieces of `arrays` name.  fingerprint: gives a hex digest of the contents.  config: the model's
    sizes, where the source says them.  folder: of a source in transformers' layout, where the processor's files are.
    tokenizer: of a run, the name of its SentencePiece model.
    """

    name: str
    arrays: Mapping[str, ModelArray]
    stored: Mapping[str, StoredArray]
    fingerprint: Callable[[], str]
    config: PaliGemmaConfig | None = None
    folder: str | None = None
    tokenizer: str | None = None


Opener = Callable[[str | os.PathLike[str]], contextlib.AbstractContextManager[Source]]


def read_box(
    source: Source, array: ModelArray, box: Box, *, seen: dict[str, list[Block]] | None = None
) -> np.ndarray:
    """A box of an array of the model, in the dtype of the array.

    seen: gets what has been read of each stored array, without the numbers, to check it by.
    """
    result = np.empty(boxes.shape_of(box), array.info.dtype)
    for piece in array.pieces:
        if (wanted := piece.view_box(box)) is None:
            continue
        stored = source.stored[piece.stored_name]
        wide = boxes.widen(wanted, piece.view, min_run=stored.min_run)
        for run in boxes.runs(wide, piece.view, max_size=_READ_SIZE):
            if (inside := boxes.intersect(run, wanted)) is None:
                continue
            block = stored.read(piece.view, run)
            if seen is not None:
                seen.setdefault(piece.stored_name, []).append(block.without_numbers())
            found, numbers = piece.to_model(inside, block.numbers[boxes.within(inside, run)])
            result[boxes.within(found, box)] = numbers
    return result
