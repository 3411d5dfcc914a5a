"""The protocol of metric writers, and the ones that keep numbers: JSONL, TensorBoard, several, none.

A run that crashed and resumes writes some steps a second time: `resume_step` makes a writer forget the first.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol


class MetricWriter(Protocol):
    """Takes the numbers of a run; the training loop calls it on one process only."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`; a step may be written more than once, with other names."""

    def close(self) -> None:
        """Flush and release what the writer holds; nothing is written afterwards."""


class NullWriter:
    """Keeps nothing: for the processes that do not report."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        del step, metrics

    def close(self) -> None:
        pass


class MultiWriter:
    """Hands everything to each of several writers, in their order."""

    def __init__(self, writers: Iterable[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Close every writer, also when one of them fails; the first failure is raised at the end."""
        failures = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


class JsonlWriter:
    """Appends one line a call to a JSONL file: {"step": 3, "time": 1700000000.5, "train/loss": 1.25, ...}.

    `time` is in Unix seconds. A line has left the process when `write` returns. A value that is not finite is
    the string "NaN", "Infinity" or "-Infinity": valid JSON that `float()` and JavaScript's `Number()` read
    back.

    resume_step: what an earlier attempt wrote about steps later than this one is dropped, because this
    attempt writes it again (-1 drops all). None keeps all. Either way a last line torn by a crash goes.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(self._path, step=resume_step)
        self._file = self._path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        row.update((name, _json_number(value)) for name, value in metrics.items())
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writes scalars as TensorBoard event files under `directory`.

    resume_step: TensorBoard is told to hide what an earlier attempt wrote about later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
        # Imported here because it takes seconds and a process without this writer should not wait for it.
        from tensorboardX import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(logdir=str(directory), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._writer.close()


def _drop_lines_after(path: Path, *, step: int | None) -> None:
    """Rewrite the JSONL file at `path` without a torn last line and without lines of steps later than `step`.

    The file is replaced as a whole or not touched: a crash in here loses nothing.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, step=step))
    if kept == content:
        return
    replacement = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with replacement.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)


def _is_kept(line: bytes, *, step: int | None) -> bool:
    if not line.endswith(b"\n"):
        return False
    if step is None:
        return True
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # nobody can say which step it was about


def _json_number(value: Any) -> int | float | str:
    """`value`, a Python, NumPy or JAX scalar, as JSON can hold it."""
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number
