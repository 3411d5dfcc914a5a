"""How far reading has got: a bar in bytes on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from absl import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pgdist import heartbeat

_INTERVAL = 10.0  # seconds between two lines
_WORTH_A_LINE = 64 * 2**20  # bytes


class ReadingProgress:
    """Shows bytes, rate and time left of one reading; a context manager. What it reads is also a sign of life."""

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._done = 0
        self._started = self._said = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ReadingProgress:
        if sys.stderr.isatty() and self._total >= _WORTH_A_LINE:
            self._bar = Progress(
                TextColumn("reading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error_type is None and self._total >= _WORTH_A_LINE:
            seconds = time.monotonic() - self._started
            logging.info(
                "Read %s of %s in %.1f s (%s/s).", _bytes(self._done), self._name, seconds, self._rate()
            )

    def advance(self, count: int) -> None:
        """So many bytes more have been read."""
        heartbeat.beat("loading")
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif self._done < self._total and time.monotonic() - self._said >= _INTERVAL:
            self._said = time.monotonic()
            left = (self._total - self._done) / max(1.0, self._done) * (self._said - self._started)
            logging.info(
                "Reading weights: %s of %s, %s/s, %d:%02d left.",
                _bytes(self._done), _bytes(self._total), self._rate(), *divmod(round(left), 60),
            )  # fmt: skip

    def _rate(self) -> str:
        return _bytes(self._done / max(1e-9, time.monotonic() - self._started))


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
