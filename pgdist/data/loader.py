"""The rows that one process feeds its devices, read ahead by threads or worker processes.

A Grain dataset has one element for each row that this process holds: element i is the row at position
rows[i % len(rows)] of step start_step + i // len(rows). The start is part of that mapping, so starting in the
middle costs nothing, and the rows come out the same whatever the number of hosts and workers. A row that
cannot be made is masked, never dropped. Prompts to be answered are padded no longer than their global batch needs.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np
from absl import flags

from pgdist.data.images import BadImage, load_image
from pgdist.data.jsonl import BadRecord, Record
from pgdist.data.order import ExampleOrder
from pgdist.data.text import EncodedText, encode_example, masked_text, prompt_bucket, prompt_ids
from pgdist.data.tokenizer import Tokenizer

PADDING_INDEX = -1

# Pillow lets go of the GIL while it decodes and filters; more threads than this wait for the GIL.
_MAX_THREADS = 16
_THREADS_PER_WORKER = 2


class Source(Protocol):
    """Examples by index; `pgdist.data.jsonl.JsonlSource` is one. Picklable where worker processes read it."""

    @property
    def path(self) -> str:
        """What messages call it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | BadRecord: ...

    def prefix_of(self, index: int) -> str | None:
        """What `self[index].prefix` is or, were its image sound, would be; None where its text is bad."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostBatch:
    """This process's rows of one global batch, in the order of `rows`; R is their number.

    arrays: image uint8[R, S, S, 3]; text, mask_ar, mask_loss, mask_input int32[R, T], with the same T in all
    processes; weight float32[R], 1 for a real row and 0 for a masked one; truncated float32[R], 1 where the text
    did not fit; index int64[R], the example id or -1 for padding.
    """

    arrays: dict[str, np.ndarray]
    records: tuple[Record | BadRecord | None, ...]  # of each row; None for padding
    bad: tuple[BadRecord, ...]
    step: int  # of training, or the number of the evaluation batch from 0


class HostBatches(Iterator[HostBatch]):
    """The batches in order; `close()` (or a `with`'s end, or the object's) stops threads and workers."""

    def __init__(
        self, rows: Iterator[_Row], lengths: Iterator[int], *, first_step: int, rows_per_step: int
    ) -> None:
        """rows: of one batch after the other.  lengths: T of each batch; what its texts have beyond it is padding."""
        self._rows = rows
        self._lengths = lengths
        self._step = first_step
        self._rows_per_step = rows_per_step
        self._closed = False

    def __next__(self) -> HostBatch:
        if self._closed:
            raise StopIteration
        try:
            rows = [next(self._rows) for _ in range(self._rows_per_step)]
        except StopIteration:
            self.close()
            raise
        self._step += 1
        return _stack(rows, length=next(self._lengths), step=self._step - 1)

    def close(self) -> None:
        """Stops reading ahead; the iterator then has no more batches."""
        self._closed = True
        self._rows.close()
        self._lengths.close()

    def __enter__(self) -> HostBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    *,
    source: Source,
    tokenizer: Tokenizer,
    image_size: int,
    text_length: int,
    seed: int,
    batch_size: int,
    rows: Sequence[int],
    start_step: int,
    num_steps: int,
    workers: int = 0,
) -> HostBatches:
    """This process's rows of the steps start_step to start_step + num_steps - 1.

    batch_size: B, of the global batch.  rows: the positions in it, 0 to B - 1, that this process holds, in
    order.
    workers: processes that read ahead; 0 reads with threads of this one. Reading starts at once.
    Example and suffix (where there are several) of each global row are drawn by the seed: see
    `pgdist.data.order`.
    """
    _check_rows(rows, batch_size=batch_size)
    reader = _Reader(source=source, tokenizer=tokenizer, image_size=image_size, text_length=text_length)
    order = ExampleOrder(len(source), seed)
    positions = _Positions(
        rows=tuple(rows), batch_size=batch_size, start_step=start_step, num_steps=num_steps
    )
    return _read_ahead(
        _TrainRows(reader=reader, order=order, positions=positions), _constant(text_length), workers=workers
    )


def evaluation_batches(
    *,
    source: Source,
    tokenizer: Tokenizer,
    image_size: int,
    text_length: int,
    batch_size: int,
    rows: Sequence[int],
    limit: int | None = None,
    first_batch: int = 0,
    prompt_only: bool = False,
    workers: int = 0,
) -> HostBatches:
    """This process's rows of all examples (or the first `limit`), each once and in order.

    The last batch is filled up with masked rows of index -1, so every process gets the same number of full
    batches. Of a list of suffixes the first is encoded.
    first_batch: the number of the batch to begin with; those before it are not read.
    prompt_only: the text ends after the separator, for decoding; `HostBatch.records` still has the suffixes. Each
    batch is padded to the `pgdist.data.text.prompt_bucket` of its longest prompt, whichever process holds that one.
    """
    _check_rows(rows, batch_size=batch_size)
    reader = _Reader(
        source=source,
        tokenizer=tokenizer,
        image_size=image_size,
        text_length=text_length,
        prompt_only=prompt_only,
    )
    count = len(source) if limit is None else min(limit, len(source))
    positions = _Positions(
        rows=tuple(rows),
        batch_size=batch_size,
        start_step=first_batch,
        num_steps=-(-count // batch_size) - first_batch,
    )
    lengths = _constant(text_length)
    if prompt_only:
        lengths = _find_ahead(_PromptBuckets(reader=reader, count=count, positions=positions))
    return _read_ahead(
        _EvaluationRows(reader=reader, count=count, positions=positions), lengths, workers=workers
    )


def find_fault(
    index: int, *, source: Source, tokenizer: Tokenizer, image_size: int, text_length: int
) -> BadRecord | None:
    """What is wrong with an example as a prompt; None where this process can read it, if others cannot."""
    reader = _Reader(
        source=source,
        tokenizer=tokenizer,
        image_size=image_size,
        text_length=text_length,
        prompt_only=True,
    )
    record = reader.read(index).record
    return record if isinstance(record, BadRecord) else None


def _check_rows(rows: Sequence[int], *, batch_size: int) -> None:
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows: expected some of the positions 0 to {batch_size - 1}, found {list(rows)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    image: np.ndarray  # uint8[S, S, 3]
    text: EncodedText
    record: Record | BadRecord | None
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader:
    """Makes one row from an example."""

    source: Source
    tokenizer: Tokenizer
    image_size: int
    text_length: int
    prompt_only: bool = False

    def read(self, index: int, *, order: ExampleOrder | None = None, global_row: int = 0) -> _Row:
        """The row of example `index`; `order`, if given, draws one of several suffixes."""
        record = self.source[index]
        if isinstance(record, BadRecord):
            return self.masked(index, record)
        if order is not None and record.suffixes:
            suffix = record.suffixes[order.choose(global_row, len(record.suffixes))]
            record = dataclasses.replace(record, suffix=suffix)
        try:
            image = load_image(record.image, size=self.image_size)
        except BadImage as error:
            reason = f"image {record.image_name!r}: {error.reason}"
            return self.masked(index, BadRecord(file=record.file, line=record.line, reason=reason))
        text = encode_example(
            self.tokenizer,
            prefix=record.prefix,
            suffix=None if self.prompt_only else record.suffix,
            length=self.text_length,
        )
        if self.prompt_only and text.truncated:
            # Cut, a prompt would lose its end and separator, and its answer all meaning.
            reason = f"the prompt is longer than {self.text_length} tokens (data.text_length, or --max_prompt_tokens)"
            return self.masked(index, BadRecord(file=record.file, line=record.line, reason=reason))
        return _Row(image=image, text=text, record=record, index=index)

    def masked(self, index: int, record: BadRecord | None) -> _Row:
        image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        text = masked_text(self.tokenizer, length=self.text_length)
        return _Row(image=image, text=text, record=record, index=index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Positions:
    """Where in the global sequence of rows each of this process's rows stands."""

    rows: tuple[int, ...]
    batch_size: int
    start_step: int
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps * len(self.rows)

    def global_row(self, local: int) -> int:
        step, row = divmod(local, len(self.rows))
        return self.global_batch(step)[self.rows[row]]

    def global_batch(self, step: int) -> range:
        """All rows of a step, those of other processes too.  step: from 0 for the first."""
        start = (self.start_step + step) * self.batch_size
        return range(start, start + self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainRows:
    reader: _Reader
    order: ExampleOrder
    positions: _Positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, local: int) -> _Row:
        global_row = self.positions.global_row(local)
        return self.reader.read(self.order.example(global_row), order=self.order, global_row=global_row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvaluationRows:
    reader: _Reader
    count: int
    positions: _Positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, local: int) -> _Row:
        index = self.positions.global_row(local)
        return self.reader.read(index) if index < self.count else self.reader.masked(PADDING_INDEX, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PromptBuckets:
    """Element i is what the prompts of global batch i are padded to.

    Every process finds the same without asking the others: the text of all rows is at hand, and their images, which
    one process may be able to read and another not, do not count.
    """

    reader: _Reader
    count: int
    positions: _Positions

    def __len__(self) -> int:
        return self.positions.num_steps

    def __getitem__(self, step: int) -> int:
        examples = (index for index in self.positions.global_batch(step) if index < self.count)
        prefixes = {self.reader.source.prefix_of(index) for index in examples} - {None}
        lengths = [len(prompt_ids(self.reader.tokenizer, prefix)) for prefix in prefixes]
        # Those that do not fit are masked.
        fitting = [length for length in lengths if length <= self.reader.text_length]
        return prompt_bucket(max(fitting, default=1), limit=self.reader.text_length)


def _constant(length: int) -> Iterator[int]:
    yield from itertools.repeat(length)


def _find_ahead(buckets: _PromptBuckets) -> Iterator[int]:
    # One thread, for it is Python that works: 10 to 50 us a prompt, with no image to wait for.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    iterator = iter(grain.MapDataset.source(buckets).to_iter_dataset(options))
    iterator.start_prefetch()
    return iterator


def _read_ahead(source: _TrainRows | _EvaluationRows, lengths: Iterator[int], *, workers: int) -> HostBatches:
    positions = source.positions
    threads = _THREADS_PER_WORKER if workers else min(_MAX_THREADS, os.cpu_count() or 1)
    # Two batches ahead, all workers together: enough to hide a slow image, bounded in memory.
    ahead = -(-2 * len(positions.rows) // max(1, workers))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        # Grain's workers read absl flags, which nobody has parsed in a notebook or another program.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_live_as_long_as_parent)
    iterator = iter(dataset)
    iterator.start_prefetch()
    return HostBatches(iterator, lengths, first_step=positions.start_step, rows_per_step=len(positions.rows))


def _live_as_long_as_parent(worker_index: int, worker_count: int) -> None:
    """Makes a worker leave when its parent does, and not before.

    Ctrl-C and a scheduler's SIGTERM reach a whole group of processes: the trainer still wants its rows while
    it saves. A trainer that is killed outright cannot stop its workers: each watches for that.
    """
    del worker_index, worker_count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True, name="leave-with-parent").start()


def _stack(rows: Sequence[_Row], *, length: int, step: int) -> HostBatch:
    bad = tuple(row.record for row in rows if isinstance(row.record, BadRecord))
    weight = [float(isinstance(row.record, Record)) for row in rows]
    return HostBatch(
        arrays={
            "image": np.stack([row.image for row in rows]),
            "text": np.stack([row.text.text[:length] for row in rows]),
            "mask_ar": np.stack([row.text.mask_ar[:length] for row in rows]),
            "mask_loss": np.stack([row.text.mask_loss[:length] for row in rows]),
            "mask_input": np.stack([row.text.mask_input[:length] for row in rows]),
            "weight": np.array(weight, np.float32),
            "truncated": np.array([row.text.truncated for row in rows], np.float32),
            "index": np.array([row.index for row in rows], np.int64),
        },
        records=tuple(row.record for row in rows),
        bad=bad,
        step=step,
    )
