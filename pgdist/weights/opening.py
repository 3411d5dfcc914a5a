"""Opening weights by name: which format a path holds, and where else than in a local file they may be."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

from pgdist import files, hub
from pgdist.errors import WeightsError
from pgdist.weights import layout, transformers_config, transformers_layout
from pgdist.weights.byte_source import read_json
from pgdist.weights.npz_reader import NpzReader
from pgdist.weights.pieces import ModelArray
from pgdist.weights.run_source import open_run, run_name
from pgdist.weights.safetensors_reader import INDEX_SUFFIX, SUFFIX, SafetensorsReader
from pgdist.weights.source import CONFIG, Source
from pgdist.weights.stored import StoredArray

_SAFETENSORS = (f"model{INDEX_SUFFIX}", f"model{SUFFIX}")


@contextlib.contextmanager
def open_source(name: str | os.PathLike[str]) -> Iterator[Source]:
    """Opens weights by name, or several with commas between them, which together make the model.

    A name is that of an npz, of a folder in transformers' layout, or of a run's folder (`runs/cows` for its newest
    checkpoint, `runs/cows@64` for that of a step); local, in a bucket (gs://), or, for models, hf:// and kaggle://
    (see `pgdist.hub`). Raises WeightsError for what is wrong with any of them, and where two have the same array.
    """
    parts = os.fspath(name).split(",")
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(_open(hub.fetch_model(part.strip()))) for part in parts]
        yield sources[0] if len(sources) == 1 else _join(sources)


def is_made_of_files(name: str | os.PathLike[str]) -> bool:
    """Whether the name is of weights themselves, and not of a run."""
    return run_name(os.fspath(name)) is None


@contextlib.contextmanager
def _open(name: str) -> Iterator[Source]:
    if name.endswith((SUFFIX, INDEX_SUFFIX)):
        folder, _, file = name.rpartition("/")
        opened = _open_transformers(folder or ".", file)
    elif name.endswith(".npz"):
        opened = _open_npz(name)
    elif run := run_name(name):
        opened = open_run(run, open_source)
    elif file := _safetensors_in(name):
        opened = _open_transformers(name, file)
    else:
        opened = _open_npz(name)
    with opened as source:
        yield source


@contextlib.contextmanager
def _open_npz(name: str) -> Iterator[Source]:
    with NpzReader(name) as reader:
        infos = [array.info for array in reader.arrays.values()]
        arrays = layout.model_arrays(infos, fortran_order=reader.fortran_order, path=reader.path)
        yield Source(name=reader.path, arrays=arrays, stored=reader.arrays, fingerprint=reader.fingerprint)


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


def _safetensors_in(name: str) -> str | None:
    """The file to open in a folder in transformers' layout; None for what is no such folder."""
    there = files.names_in(name)
    for file in _SAFETENSORS:
        if file in there:
            return file
    others = [file for file in there if file.endswith((SUFFIX, INDEX_SUFFIX))]
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(
            f"{name}: holds several safetensors files and no index: {', '.join(others[:5])}. Name one."
        )
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
        name=" and ".join(source.name for source in sources),
        arrays=arrays,
        stored=stored,
        fingerprint=fingerprint,
    )
