"""The progress bar: a bar where stderr is a terminal, a plain line now and then where it is not.

It is a `MetricWriter` like the others. It must never be the reason why a run ends, so all it prints goes
through a stream that falls silent at its first error.
"""

from __future__ import annotations

import logging as python_logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from absl import logging


class ProgressBar:
    """Shows step, loss, examples/s, tokens/s, MFU where it is known, and the time left.

    stream: None is stderr.  line_interval: seconds between two lines where there is no terminal.
    clock: monotonic seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        line_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        quiet = _QuietStream(sys.stderr if stream is None else stream)
        on_terminal = quiet.isatty() and os.environ.get("TERM") != "dumb"
        self._display: _BarDisplay | _LineDisplay
        if on_terminal:
            self._display = _BarDisplay(quiet, total_steps=total_steps, start_step=start_step, clock=clock)
        else:
            self._display = _LineDisplay(quiet, total_steps=total_steps, interval=line_interval, clock=clock)
        self._total_steps = total_steps
        self._step = start_step
        self._latest: dict[str, float] = {}
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first call

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = max(self._step, int(step))
        self._latest.update((name, float(value)) for name, value in metrics.items())
        if "train/loss" in metrics:
            if self._first is None:
                # The rate counts from the end of the first step: compiling it took longer than any other will.
                self._first = (self._step, self._clock())
            self._display.show(self._step, self._status())
        evaluated = {name: float(value) for name, value in metrics.items() if name.startswith("validation/")}
        if evaluated:
            self._display.note(f"step {step}: validation " + _join_values(evaluated))

    def close(self) -> None:
        self._display.close(self._step, self._status())

    def _status(self) -> str:
        """What follows the step count: "loss 0.8123  41.0 examples/s  5,248 tokens/s  MFU 61.3%  ETA 0:01:40"."""
        parts = []
        if "train/loss" in self._latest:
            parts.append(f"loss {self._latest['train/loss']:.4f}")
        if "train/examples_per_second" in self._latest:
            parts.append(f"{self._latest['train/examples_per_second']:,.1f} examples/s")
        if "train/tokens_per_second" in self._latest:
            parts.append(f"{self._latest['train/tokens_per_second']:,.0f} tokens/s")
        if "train/mfu" in self._latest:
            parts.append(f"MFU {self._latest['train/mfu']:.1%}")
        parts.append(f"ETA {self._time_left()}")
        return "  ".join(parts)

    def _time_left(self) -> str:
        if self._step >= self._total_steps:
            return "0:00:00"
        if self._first is None or self._step <= self._first[0]:
            return "-:--:--"
        first_step, first_time = self._first
        seconds = (self._clock() - first_time) / (self._step - first_step) * (self._total_steps - self._step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


class _LineDisplay:
    """A plain line for the first step, the last one, and one every `interval` seconds between them."""

    def __init__(
        self, stream: _QuietStream, *, total_steps: int, interval: float, clock: Callable[[], float]
    ):
        self._stream = stream
        self._total_steps = total_steps
        self._interval = interval
        self._clock = clock
        self._shown_at = -math.inf
        self._shown_step: int | None = None

    def show(self, step: int, status: str) -> None:
        due = step >= self._total_steps or self._clock() - self._shown_at >= self._interval
        if due and step != self._shown_step:
            self._shown_at, self._shown_step = self._clock(), step
            self.note(f"step {step}/{self._total_steps}  {status}")

    def note(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self, step: int, status: str) -> None:
        # A run that ends early would otherwise leave its last interval unsaid.
        if self._shown_step is not None and step != self._shown_step:
            self.note(f"step {step}/{self._total_steps}  {status}")


class _BarDisplay:
    """A bar on the terminal's last line; log messages go above it."""

    _REFRESH_SECONDS = 0.1

    def __init__(
        self, stream: _QuietStream, *, total_steps: int, start_step: int, clock: Callable[[], float]
    ):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False, markup=False, force_terminal=True)
        # auto_refresh would start a thread, and data workers are forked or spawned beside us.
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,  # stdout may be a pipe that somebody reads
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, status="")
        self._clock = clock
        self._refreshed_at = -math.inf
        self._moved_handlers: list[tuple[python_logging.StreamHandler, TextIO]] = []
        self._started = False

    def show(self, step: int, status: str) -> None:
        self._start()
        due = self._clock() - self._refreshed_at >= self._REFRESH_SECONDS
        self._progress.update(self._task, completed=step, status=status, refresh=due)
        if due:
            self._refreshed_at = self._clock()

    def note(self, text: str) -> None:
        self._start()
        self._console.print(text)

    def close(self, step: int, status: str) -> None:
        if not self._started:
            return
        self._progress.update(self._task, completed=step, status=status, refresh=True)
        self._progress.stop()
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._started = False

    def _start(self) -> None:
        """Draw the bar for the first time; from now on what goes to stderr appears above it."""
        if self._started:
            return
        self._started = True
        before = sys.stderr
        self._progress.start()
        # A process that ends by os._exit or a signal could not bring a hidden cursor back.
        self._console.show_cursor(True)
        handlers: Sequence[Any] = [
            *python_logging.getLogger().handlers,
            logging.get_absl_handler().python_handler,
        ]
        for handler in handlers:
            if isinstance(handler, python_logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)  # rich's, which knows of the bar
                self._moved_handlers.append((handler, before))


class _QuietStream:
    """A text stream that says nothing any more after its first error, and never raises one.

    rich ends the process on a broken pipe; a run whose terminal has gone should go on.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return bool(self._attempt(lambda stream: stream.isatty()))

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, call: Callable[[TextIO], Any]) -> Any:
        if self._stream is None:
            return None
        try:
            return call(self._stream)
        except (OSError, ValueError):  # ValueError: closed
            self._stream = None
            return None


def _join_values(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name.rpartition('/')[2]} {value:.4f}" for name, value in metrics.items())
