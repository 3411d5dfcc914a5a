"""Fitting a source to a model that is not quite its own: another resolution, more words, parts left out.

An adaptation replaces an array of the source by one that is computed when it is read. Each is logged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy.ndimage
from absl import logging

from pgdist.errors import ConfigError
from pgdist.weights import boxes
from pgdist.weights.array_info import ArrayInfo, Shaped
from pgdist.weights.boxes import Box
from pgdist.weights.casting import cast
from pgdist.weights.pieces import ModelArray, whole_piece
from pgdist.weights.source import Source, read_box
from pgdist.weights.stored import Block, StoredArray

_POSITIONS, _EMBEDDING = "img/pos_embedding", "llm/embedder/input_embedding"
_NEW_ROW_SCALE = 0.02  # standard deviation, as published


def fit(source: Source, expected: Mapping[str, Shaped], *, skip: Sequence[str] = (), seed: int = 0) -> Source:
    """The source with the arrays that a model of the `expected` names and shapes needs, as far as they can be made.

    skip: regexes; what they match in full is left out of the source.
    seed: of the rows that an embedding lacks, drawn from 0.02 * normal, the same in every process.

    Position embeddings of another number of image tokens are resized (square grids, bilinearly, corners kept; as the
    published implementation's `scipy.ndimage.zoom(order=1)`). What does not fit otherwise is left as it is.
    """
    for pattern in skip:
        _compile(pattern)
    arrays = {name: array for name, array in source.arrays.items() if not matches(name, skip)}
    if left_out := sorted(source.arrays.keys() - arrays.keys()):
        logging.info("Not read, as config.init_skip says: %s.", ", ".join(left_out))
    stored = dict(source.stored)
    for name, make in ((_POSITIONS, _resized), (_EMBEDDING, functools.partial(_extended, seed=seed))):
        if name in arrays and name in expected:
            computed = make(source, arrays[name], tuple(expected[name].shape))
            if computed is not None:
                stored[computed.info.name] = computed
                arrays[name] = ModelArray(
                    info=dataclasses.replace(computed.info, name=name), pieces=(whole_piece(computed.info),)
                )
    return dataclasses.replace(source, arrays=arrays, stored=stored)


def refuse_idle_patterns(skip: Sequence[str], *, names: Sequence[str]) -> None:
    """Raises ConfigError for a regex that matches none of the names, of the model and of the file, in full."""
    for pattern in skip:
        if not any(_compile(pattern).fullmatch(name) for name in names):
            raise ConfigError(
                f"config.init_skip: {pattern!r} matches no array of the model or the file. It has to match a "
                "whole name, such as img/head/.* for all whose names begin so."
            )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regexes matches the whole name."""
    return any(_compile(pattern).fullmatch(name) for pattern in patterns)


class _ComputedArray:
    """A StoredArray that is made of others when a box of it is read.

    stored: the source's arrays.  seen: what `compute` has read of which of them.  forget: lets go of what it keeps.
    """

    min_run = 1

    def __init__(
        self,
        info: ArrayInfo,
        *,
        compute: Callable[[Box], np.ndarray],
        forget: Callable[[], None],
        stored: Mapping[str, StoredArray],
        seen: Mapping[str, list[Block]],
    ) -> None:
        self.info = info
        self.nbytes = info.nbytes
        self._compute = compute
        self._forget = forget
        self._stored = stored
        self._seen = seen

    def read(self, view: Sequence[int], box: Box) -> Block:
        """See StoredArray; `view` is the array's own shape."""
        numbers = cast(self._compute(box), self.info.dtype)
        offset = boxes.offset_of(box, view) * self.info.dtype.itemsize
        return Block(box=box, numbers=numbers, offset=offset, size=numbers.nbytes, crc=None)

    def check(self, blocks: Iterable[Block]) -> None:
        """Checks what it is made of."""
        for name, found in self._seen.items():
            self._stored[name].check(found)

    def release(self) -> None:
        """See StoredArray."""
        self._forget()
        for name in self._seen:
            self._stored[name].release()


def _resized(source: Source, array: ModelArray, shape: tuple[int, ...]) -> StoredArray | None:
    """Position embeddings (1, N, W) of another number of image tokens."""
    old = array.info.shape
    if len(old) != 3 or len(shape) != 3 or old == shape or (old[0], old[2]) != (shape[0], shape[2]):
        return None
    sides = [math.isqrt(old[1]), math.isqrt(shape[1])]
    if [side * side for side in sides] != [old[1], shape[1]] or 0 in sides:
        return None
    logging.info(
        "%s: resized from %d x %d to %d x %d image tokens, bilinearly.",
        _POSITIONS,
        *[sides[0]] * 2,
        *[sides[1]] * 2,
    )

    seen: dict[str, list[Block]] = {}
    lock = threading.Lock()  # one thread reads and resizes, the others wait for it

    @functools.cache
    def resize() -> np.ndarray:
        numbers = read_box(source, array, boxes.whole(old), seen=seen).astype(np.float32)
        grid = numbers.reshape(sides[0], sides[0], old[2])
        factor = sides[1] / sides[0]
        return scipy.ndimage.zoom(grid, (factor, factor, 1), order=1).reshape(shape)

    def part(box: Box) -> np.ndarray:
        with lock:
            return resize()[boxes.within(box, boxes.whole(shape))]

    info = ArrayInfo(name=f"{_POSITIONS} (resized)", shape=shape, dtype=np.dtype(np.float32))
    return _ComputedArray(info, compute=part, forget=resize.cache_clear, stored=source.stored, seen=seen)


def _extended(source: Source, array: ModelArray, shape: tuple[int, ...], *, seed: int) -> StoredArray | None:
    """An embedding (V, D) with rows for more words."""
    old = array.info.shape
    if len(old) != 2 or len(shape) != 2 or old[1] != shape[1] or not 0 < old[0] < shape[0]:
        return None
    more = shape[0] - old[0]
    logging.info(
        "%s: extended from %d to %d rows, the new ones from %g * normal with seed %d.",
        _EMBEDDING, old[0], shape[0], _NEW_ROW_SCALE, seed,
    )  # fmt: skip

    seen: dict[str, list[Block]] = {}

    @functools.cache
    def new_rows() -> np.ndarray:
        rows = np.random.default_rng(seed).standard_normal((more, shape[1]), dtype=np.float32)
        return cast(_NEW_ROW_SCALE * rows, array.info.dtype)

    def rows(box: Box) -> np.ndarray:
        (lo, hi), columns = box
        found = []
        if lo < old[0]:
            found.append(read_box(source, array, ((lo, min(hi, old[0])), columns), seen=seen))
        if hi > old[0]:
            found.append(new_rows()[max(0, lo - old[0]) : hi - old[0], slice(*columns)])
        return np.concatenate(found)

    info = ArrayInfo(name=f"{_EMBEDDING} (extended)", shape=shape, dtype=array.info.dtype)
    return _ComputedArray(info, compute=rows, forget=new_rows.cache_clear, stored=source.stored, seen=seen)


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"config.init_skip: {pattern!r} is not a regular expression: {error}.") from error
