"""Loading: from a source straight onto the devices' shards, each array cast on the way.

Each array is read in blocks of a few MiB by several threads, in the order of the file. A block is checked, cast and
copied to the buffers of the shards that it touches, so that memory is the final arrays, the buffers of about one array
and the blocks in flight.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from pgdist import cluster
from pgdist.weights import boxes, fitting, mismatch, reading_plan
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.casting import cast, check_finite, may_overflow
from pgdist.weights.opening import open_source
from pgdist.weights.pieces import ModelArray
from pgdist.weights.placement import ShardBuffers, needed_boxes
from pgdist.weights.reading_plan import Read
from pgdist.weights.reading_progress import ReadingProgress
from pgdist.weights.source import Source
from pgdist.weights.stored import Block

PathLike = str | os.PathLike[str]

_BLOCK_BYTES = 8 * 2**20
_REMOTE_READS = 16  # at once: each waits for the network most of the time


def read_header(path: PathLike) -> dict[str, ArrayInfo]:
    """Names (the model's), shapes and dtypes of the arrays of a source, in the file's order; reads no data.

    Raises WeightsError if it cannot be read or holds something other than arrays of numbers.
    """
    with open_source(path) as source:
        return {name: array.info for name, array in source.arrays.items()}


def fingerprint(path: PathLike) -> str:
    """Hex digest of a source's contents, without reading them: for an npz the names, sizes and CRCs of its directory.

    The order of the arrays in the file and its name do not matter.
    """
    with open_source(path) as source:
        return source.fingerprint()


def load(
    path: PathLike,
    *,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Sharding] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    allow_non_finite: bool = False,
    layouts: mismatch.Layouts | None = None,
    hint: str = "",
) -> dict[str, jax.Array]:
    """The arrays of a source, each cast to its expected dtype and on its sharding, under the model's names.

    path: anything that `open_source` opens.
    expected: {name: shape and dtype}; the source must hold exactly these, but for what `fitting.fit` adapts.
    shardings: where each array goes; None, or a name that is absent: the default device.
    dtypes: overrides the dtypes of `expected`.
    skip: regexes; arrays whose whole name matches one are neither read nor returned.
    seed: of the rows that an embedding lacks.
    layouts, hint: how to go on after a mismatch; see `mismatch.check_fits`.

    Raises ConfigError for a regex of `skip` that matches nothing, and WeightsError if the source cannot be read, is
    damaged, does not fit, or holds a NaN or infinity (or a number that becomes one in the wanted dtype), which
    `allow_non_finite` lets pass. Where shardings are spread over processes all of these must call, and each reads a
    part; what is wrong ends all of them. A checksum is compared where one process reads the whole array.
    """
    names = tuple(expected)
    expected = {name: leaf for name, leaf in expected.items() if not fitting.matches(name, skip)}
    wanted = {name: np.dtype((dtypes or {}).get(name, leaf.dtype)) for name, leaf in expected.items()}
    shardings = shardings or {}
    opened: list[Source] = []

    def open_fitting_source() -> None:
        found = stack.enter_context(open_source(path))
        fitting.refuse_idle_patterns(skip, names=(*names, *found.arrays))
        source = fitting.fit(found, expected, skip=skip, seed=seed)
        found = {name: array.info for name, array in source.arrays.items()}
        mismatch.check_fits(found, expected=expected, path=source.name, layouts=layouts, hint=hint)
        opened.append(source)

    with contextlib.ExitStack() as stack:
        if any(map(reading_plan.is_spread, shardings.values())):
            cluster.together(open_fitting_source)
        else:
            open_fitting_source()
        (source,) = opened
        loads = [
            _ArrayLoad(
                array,
                source,
                dtype=wanted[name],
                sharding=shardings.get(name),
                allow_non_finite=allow_non_finite,
            )
            for name, array in source.arrays.items()
        ]
        arrays = _run(loads, source)
    return {name: arrays[name] for name in expected}


class _ArrayLoad:
    """One array on its way: what is to be read of it, the buffers that it goes to, and what has been read."""

    def __init__(
        self,
        array: ModelArray,
        source: Source,
        *,
        dtype: np.dtype,
        sharding: Sharding | None,
        allow_non_finite: bool,
    ) -> None:
        self.name = array.info.name
        self.is_spread = sharding is not None and reading_plan.is_spread(sharding)
        self._array = array
        self._source = source
        self._dtype = dtype
        self._sharding = sharding
        self._reading_sharding = reading_plan.sharding_to_read_on(array, source.stored, sharding)
        self._allow_non_finite = allow_non_finite
        self._buffers: ShardBuffers | None = None
        self._futures: list[concurrent.futures.Future[Block]] = []
        needed = needed_boxes(array.info.shape, self._reading_sharding)
        self._reads = list(reading_plan.reads(array, source.stored, needed, max_bytes=_BLOCK_BYTES))
        self.stored_names = tuple(dict.fromkeys(read.piece.stored_name for read in self._reads))
        self.nbytes = sum(self._size_of(read) for read in self._reads)
        self.buffer_bytes = sum(boxes.size_of(box) for box in needed) * dtype.itemsize

    def start(self, pool: concurrent.futures.Executor) -> None:
        """Allocates the buffers and begins to read."""
        self._buffers = ShardBuffers(
            self._array.info.shape, dtype=self._dtype, sharding=self._reading_sharding
        )
        self._futures = [pool.submit(self._read, read) for read in self._reads]

    def finish(
        self, progress: ReadingProgress, blocks: dict[str, list[Block]], *, done_with: Sequence[str]
    ) -> jax.Array:
        """The array, when all of it is read; what went wrong in one process ends all that share it.

        blocks: what has been read of each stored array, for its checksum.  done_with: stored arrays of which nothing
        is read after this.
        """
        if self.is_spread:
            cluster.together(lambda: self._wait(progress, blocks, done_with))
        else:
            self._wait(progress, blocks, done_with)
        array = self._buffers.to_devices()
        self._buffers = None
        if self._reading_sharding is not self._sharding:
            array = reading_plan.exchange(array, self._sharding)
        gc.collect(0)  # only when Python collects does JAX let go of the host buffers that it was given
        return array

    def cancel(self) -> None:
        """Nothing that has not begun is read any more."""
        for future in self._futures:
            future.cancel()

    def _wait(
        self, progress: ReadingProgress, blocks: dict[str, list[Block]], done_with: Sequence[str]
    ) -> None:
        for read, future in zip(self._reads, self._futures, strict=True):
            blocks[read.piece.stored_name].append(future.result())
            progress.advance(self._size_of(read))
        self._futures = []
        for name in done_with:
            self._source.stored[name].check(blocks[name])
            self._source.stored[name].release()

    def _read(self, read: Read) -> Block:
        """Reads a block and writes it to the buffers; returns it without its numbers."""
        piece, stored = read.piece, self._source.stored[read.piece.stored_name]
        block = stored.read(piece.view, read.box)
        numbers = block.numbers
        if not self._allow_non_finite:
            # Where nothing can become infinite the cast waits for the copy, which saves a copy.
            if may_overflow(numbers.dtype, self._dtype):
                numbers = cast(numbers, self._dtype)
            check_finite(numbers, source=block.numbers, name=stored.info.name, path=self._source.name)
        numbers = numbers[boxes.within(read.inside, read.box)]
        self._buffers.write(*piece.to_model(read.inside, numbers))
        return block.without_numbers()

    def _size_of(self, read: Read) -> int:
        return boxes.size_of(read.box) * self._source.stored[read.piece.stored_name].info.dtype.itemsize


def _run(loads: Sequence[_ArrayLoad], source: Source) -> dict[str, jax.Array]:
    """Reads all arrays in order, several at once as long as their buffers are no more than the largest one's."""
    room = max((load.buffer_bytes for load in loads), default=0)
    last_of = {name: load for load in loads for name in load.stored_names}
    arrays: dict[str, jax.Array] = {}
    blocks: dict[str, list[Block]] = collections.defaultdict(list)
    started: collections.deque[_ArrayLoad] = collections.deque()
    with (
        ReadingProgress(source.name, sum(load.nbytes for load in loads)) as progress,
        _pool(started, source) as pool,
    ):

        def finish_first() -> None:
            load = started[0]
            done_with = [name for name in load.stored_names if last_of[name] is load]
            arrays[load.name] = load.finish(progress, blocks, done_with=done_with)
            started.popleft()

        for load in loads:
            while started and sum(other.buffer_bytes for other in started) + load.buffer_bytes > room:
                finish_first()
            load.start(pool)
            started.append(load)
        while started:
            finish_first()
    return arrays


@contextlib.contextmanager
def _pool(started: collections.deque[_ArrayLoad], source: Source) -> Iterator[concurrent.futures.Executor]:
    # More threads than processors fight over memory: twice as many take half as long again.
    count = _REMOTE_READS if "://" in source.name else max(2, min(8, len(os.sched_getaffinity(0))))
    with concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="weights") as pool:
        try:
            yield pool
        finally:
            for load in started:
                load.cancel()
