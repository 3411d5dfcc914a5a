"""Where weights come from: one view of an npz, of safetensors in transformers' layout, of several files together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pgdist import files
from pgdist.errors import WeightsError
from pgdist.models.paligemma import PaliGemmaConfig
from pgdist.weights import boxes, layout, transformers_config, transformers_layout
from pgdist.weights.boxes import Box
from pgdist.weights.byte_source import open_bytes
from pgdist.weights.npz_reader import NpzReader
from pgdist.weights.pieces import ModelArray
from pgdist.weights.safetensors_reader import INDEX_SUFFIX, SUFFIX, SafetensorsReader
from pgdist.weights.stored import Block, StoredArray

CONFIG = "config.json"
_SAFETENSORS = (f"model{INDEX_SUFFIX}", f"model{SUFFIX}")
_READ_SIZE = 2 * 2**20  # elements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that can be read, under the model's names and in the order of the file.

    stored: what the pieces of `arrays` name.  fingerprint: gives a hex digest of the contents.  config: the model's
    sizes, where the source says them.  folder: of a source in transformers' layout, where the processor's files are.
    """

    name: str
    arrays: Mapping[str, ModelArray]
    stored: Mapping[str, StoredArray]
    fingerprint: Callable[[], str]
    config: PaliGemmaConfig | None = None
    folder: str | None = None


@contextlib.contextmanager
def open_source(name: str | os.PathLike[str]) -> Iterator[Source]:
    """Opens an npz or a folder in transformers' layout, or several of these with commas between their names.

    Local ones, and in gs:// buckets. Raises WeightsError for what is wrong with any of them, and where two have the
    same array.
    """
    parts = os.fspath(name).split(",")
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(_open(part.strip())) for part in parts]
        yield sources[0] if len(sources) == 1 else _join(sources)


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
        for run in boxes.runs(wanted, piece.view, max_size=_READ_SIZE):
            block = source.stored[piece.stored_name].read(piece.view, run)
            if seen is not None:
                seen.setdefault(piece.stored_name, []).append(block.without_numbers())
            found, numbers = piece.to_model(run, block.numbers)
            result[boxes.within(found, box)] = numbers
    return result


@contextlib.contextmanager
def _open(name: str) -> Iterator[Source]:
    if name.endswith((SUFFIX, INDEX_SUFFIX)):
        folder, _, file = name.rpartition("/")
        with _open_transformers(folder or ".", file) as source:
            yield source
    elif file := _safetensors_in(name):
        with _open_transformers(name, file) as source:
            yield source
    else:
        with NpzReader(name) as reader:
            infos = [array.info for array in reader.arrays.values()]
            arrays = layout.model_arrays(infos, fortran_order=reader.fortran_order, path=reader.path)
            yield Source(
                name=reader.path, arrays=arrays, stored=reader.arrays, fingerprint=reader.fingerprint
            )


@contextlib.contextmanager
def _open_transformers(folder: str, file: str) -> Iterator[Source]:
    path = os.path.join(folder, CONFIG)
    config = transformers_config.from_json(read_json(path), path=path)
    with SafetensorsReader(os.path.join(folder, file)) as reader:
        infos = [array.info for array in reader.arrays.values()]
        arrays = transformers_layout.model_arrays(infos, config, path=reader.path)
        yield Source(
            name=reader.path,
            arrays=arrays,
            stored=reader.arrays,
            fingerprint=reader.fingerprint,
            config=config,
            folder=folder,
        )


def read_json(path: str) -> dict[str, Any]:
    """A JSON object in a file or bucket; WeightsError where it is none."""
    with contextlib.closing(open_bytes(path)) as source:
        content = source.read(0, source.size).tobytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise WeightsError(f"{path}: is not JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(found).__name__}. Download it again.")
    return found


def _safetensors_in(name: str) -> str | None:
    """The file to open in a folder in transformers' layout; None for what is no such folder."""
    folder = os.path.expanduser(name)
    if files.is_url(name) or not os.path.isdir(folder):
        return None
    there = sorted(os.listdir(folder))
    for file in _SAFETENSORS:
        if file in there:
            return file
    others = [file for file in there if file.endswith((SUFFIX, INDEX_SUFFIX))]
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(f"{name}: holds several safetensors files and no index: {', '.join(others[:5])}. Name one.")
    if pickled := [file for file in there if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        raise WeightsError(
            f"{name}: holds {pickled[0]}, a pickle, which may run any code and is never loaded. Use a folder with "
            "safetensors files (transformers: save_pretrained)."
        )
    return None


def _join(sources: Sequence[Source]) -> Source:
    arrays: dict[str, ModelArray] = {}
    stored: dict[str, StoredArray] = {}
    for number, source in enumerate(sources):
        for name, array in source.arrays.items():
            if name in arrays:
                raise WeightsError(
                    f"{source.name}: has array {name!r}, and so has one before it. Leave it out of one of them."
                )
            renamed = (dataclasses.replace(p, stored_name=f"{number}:{p.stored_name}") for p in array.pieces)
            arrays[name] = dataclasses.replace(array, pieces=tuple(renamed))
        stored |= {f"{number}:{name}": array for name, array in source.stored.items()}

    def fingerprint() -> str:
        return hashlib.sha256(repr([source.fingerprint() for source in sources]).encode()).hexdigest()

    return Source(
        name=" and ".join(source.name for source in sources), arrays=arrays, stored=stored, fingerprint=fingerprint
    )
