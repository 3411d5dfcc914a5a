"""From one layout to the other: any source to a published npz, or to a folder that transformers loads.

One block of one array is in memory at a time: a layer, or some rows. The result takes its place when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from pgdist import files, hub
from pgdist.errors import WeightsError
from pgdist.models.paligemma import PaliGemmaConfig, parameter_shapes
from pgdist.models.presets import config_of
from pgdist.parameters import flatten
from pgdist.weights import boxes, mismatch, transformers_config, transformers_layout
from pgdist.weights.boxes import Box
from pgdist.weights.casting import cast, check_finite, check_range
from pgdist.weights.local_path import local_path
from pgdist.weights.npz_writer import NpzWriter
from pgdist.weights.opening import open_source
from pgdist.weights.pieces import ModelArray
from pgdist.weights.reading_progress import ReadingProgress
from pgdist.weights.safetensors_writer import SafetensorsWriter
from pgdist.weights.source import CONFIG, Source, read_box
from pgdist.weights.stored import Block
from pgdist.weights.transformers_layout import Tensor

PathLike = str | os.PathLike[str]

_ROWS_BYTES = 32 * 2**20  # of an array that is stored in the same order in both layouts
_EMBEDDING = "llm/embedder/input_embedding"


def convert(
    source: PathLike,
    target: PathLike,
    *,
    dtype: np.dtype | None = None,
    force: bool = False,
    allow_non_finite: bool = False,
    tokenizer: PathLike | None = None,
    config: PaliGemmaConfig | None = None,
) -> None:
    """Writes the arrays of a source as a published npz (`target` ends in .npz) or as a transformers folder.

    source: anything that `open_source` opens.  dtype: cast floating arrays to it; None keeps each array's own, so
    that nothing is lost.  force: replace what is there.  tokenizer: a SentencePiece model for a transformers folder;
    the source's own by default, where it is such a folder or a run.  config: the model, for a transformers folder; by
    default as the source says, or by its shapes (`pgdist.models.presets.config_of`).

    An existing target stays as it was until the new one is complete. Raises WeightsError for what is wrong with the
    source, where the target exists or cannot be written, for numbers that are too large for `dtype`, and for a NaN or
    infinity unless `allow_non_finite`.
    """
    path = local_path(target)
    _check_target(path, force=force)
    with open_source(source) as opened:
        reader = _Reader(opened, dtype=dtype, allow_non_finite=allow_non_finite)
        logging.info(
            "Converting %s to %s: %d arrays, %s.", opened.name, path, len(opened.arrays), reader.summary()
        )
        with ReadingProgress(opened.name, reader.nbytes) as reader.progress:
            if path.suffix == ".npz":
                _write_npz(reader, path)
            else:
                _write_transformers(
                    reader, path, config=config or _config_of(opened), tokenizer=tokenizer or opened.tokenizer
                )
    logging.info("Wrote %s.", path)


class _Reader:
    """Blocks of a source's arrays in the wanted dtype, checked."""

    progress: ReadingProgress

    def __init__(self, source: Source, *, dtype: np.dtype | None, allow_non_finite: bool) -> None:
        self.source = source
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._allow_non_finite = allow_non_finite
        self._seen: dict[str, list[Block]] = {}
        self.nbytes = sum(array.info.nbytes for array in source.arrays.values())

    def dtype_of(self, array: ModelArray) -> np.dtype:
        """What the array is written in."""
        floating = array.info.dtype.kind not in "iub"
        return self._dtype if self._dtype is not None and floating else array.info.dtype

    def summary(self) -> str:
        """How many parameters, from which dtype to which."""
        count = sum(math.prod(array.info.shape) for array in self.source.arrays.values())
        arrays = self.source.arrays.values()
        dtypes = sorted({f"{array.info.dtype} -> {self.dtype_of(array)}" for array in arrays})
        return f"{count:,} parameters, {', '.join(dtypes)}"

    def read(self, array: ModelArray, box: Box) -> np.ndarray:
        """A box of the array."""
        numbers = read_box(self.source, array, box, seen=self._seen)
        result = cast(numbers, self.dtype_of(array))
        check = check_range if self._allow_non_finite else check_finite
        check(result, source=numbers, name=array.info.name, path=self.source.name)
        self.progress.advance(numbers.nbytes)
        return result

    def finish(self, array: ModelArray) -> None:
        """To be called when all of an array has been read: compares its checksum."""
        for name in dict.fromkeys(piece.stored_name for piece in array.pieces):
            self.source.stored[name].check(self._seen.get(name, []))
            self.source.stored[name].release()


def _write_npz(reader: _Reader, path: Path) -> None:
    with NpzWriter(path) as writer:
        for name, array in sorted(reader.source.arrays.items()):
            parts = (reader.read(array, box) for box in _parts(array))
            writer.write_parts(name, shape=array.info.shape, dtype=reader.dtype_of(array), parts=parts)
            reader.finish(array)


def _write_transformers(
    reader: _Reader, path: Path, *, config: PaliGemmaConfig, tokenizer: PathLike | None
) -> None:
    source = reader.source
    mismatch.check_fits(
        {name: array.info for name, array in source.arrays.items()},
        expected=flatten(parameter_shapes(config)),
        path=source.name,
        hint="A folder for transformers needs the whole model.",
    )
    rows = transformers_config.padded_vocab_size(config)
    table = transformers_layout.tensors(config, padded_vocab_size=rows)
    tensors = {
        name: (tensor.shape, reader.dtype_of(source.arrays[tensor.model_name]))
        for name, tensor in table.items()
    }
    dtype = max((dtype for _, dtype in tensors.values()), key=lambda dtype: dtype.itemsize)
    with _new_folder(path) as folder:
        content = transformers_config.to_json(config, dtype=dtype.name)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        transformers_config.write_processor_files(
            folder,
            config=config,
            tokenizer=hub.fetch_file(os.fspath(tokenizer), field="tokenizer") if tokenizer else None,
            source=_tokenizer_folder(source),
        )
        with SafetensorsWriter(folder, tensors) as writer:
            for array in source.arrays.values():
                for name, tensor in table.items():
                    if tensor.model_name == array.info.name:
                        _write_tensor(reader, writer, name, tensor, array)
                reader.finish(array)


def _tokenizer_folder(source: Source) -> Path | None:
    """The local folder that has the tokenizer's files of a transformers folder; None for other sources."""
    if source.folder is None or not files.is_url(source.folder):
        return None if source.folder is None else Path(source.folder)
    names = [name for name in files.names_in(source.folder) if name in transformers_config.TOKENIZER_FILES]
    fetched = [hub.fetch_file(f"{source.folder}/{name}", field="tokenizer") for name in names]
    return fetched[0].parent if fetched else None


def _write_tensor(
    reader: _Reader, writer: SafetensorsWriter, name: str, tensor: Tensor, array: ModelArray
) -> None:
    """A tensor from the block of the array that it is; rows of it that no array has get the mean of the others."""
    total, first = np.zeros(tensor.shape[-1:], np.float64), 0
    for box in _blocks_of(tensor, array):
        numbers = reader.read(array, box).reshape([hi - lo for lo, hi in box[len(tensor.piece.index) :]])
        order = np.argsort(tensor.piece.axes)
        stored = numbers.transpose(order)
        writer.write(name, stored, first=first)
        first += stored.size
        if array.info.name == _EMBEDDING:
            total += stored.sum(axis=0, dtype=np.float64)
    missing = math.prod(tensor.shape) - first
    if missing:  # a mean row never has the highest logit
        mean = (total / array.info.shape[0]).astype(reader.dtype_of(array))
        writer.write(name, np.broadcast_to(mean, (missing // mean.size, mean.size)), first=first)


def _parts(array: ModelArray) -> Iterator[Box]:
    """Boxes that cover an array in C order, none larger than a piece of it, and small where both orders are one."""
    shape = array.info.shape
    lead = len(array.pieces[0].index)
    in_order = all(piece.axes == tuple(sorted(piece.axes)) for piece in array.pieces)
    if in_order:
        yield from boxes.split(shape, max_size=max(1, _ROWS_BYTES // array.info.dtype.itemsize))
    else:
        yield from boxes.split(shape, max_size=math.prod(shape[lead:]))


def _blocks_of(tensor: Tensor, array: ModelArray) -> Iterator[Box]:
    """The boxes of the array that make the tensor, in the order of its data."""
    piece = tensor.piece
    lead = tuple((at, at + 1) for at in piece.index)
    block = array.info.shape[len(lead) :]
    if piece.axes == tuple(range(len(block))):
        for box in boxes.split(block, max_size=max(1, _ROWS_BYTES // array.info.dtype.itemsize)):
            yield lead + box
    else:
        yield lead + boxes.whole(block)


def _config_of(source: Source) -> PaliGemmaConfig:
    if source.config is not None:
        return source.config
    try:
        return config_of({name: array.info.shape for name, array in source.arrays.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(
            f"{source.name}: is no whole PaliGemma (array {error} is missing or of another shape), which a folder for "
            "transformers has to be."
        ) from error


def _check_target(path: Path, *, force: bool) -> None:
    if path.name.endswith(".safetensors"):
        raise WeightsError(f"{path}: name a folder for transformers, or a file that ends in .npz.")
    # os.path: what cannot be looked at is not there; that it cannot be made either is said where it is tried.
    exists, is_folder = os.path.exists(path), os.path.isdir(path)
    if exists and not force:
        raise WeightsError(f"{path}: exists. Name another place, or give --force to replace it.")
    if path.suffix != ".npz" and exists and not is_folder:
        raise WeightsError(f"{path}: is a file; name a folder for transformers, or a file that ends in .npz.")
    if is_folder and path.suffix != ".npz" and any(path.iterdir()) and not _is_transformers_folder(path):
        raise WeightsError(f"{path}: is a folder of something else, which is not replaced. Name another one.")


def _is_transformers_folder(path: Path) -> bool:
    """By its config.json: a run has one too."""
    try:
        return "model_type" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place when all is in it, or goes."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        old = path.with_name(f"{partial.name}.old")
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot write the weights: {error.strerror or error}. Nothing that was there has changed; name "
            "another place or make room."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
