"""Where the wall time goes between the ends of two steps: the device computing, or waiting, and for what.

Steps are handed to the device before the one before has ended, so what the host does meanwhile costs nothing. Time is
lost only where the device has ended a step and the next one has not been handed over. A thread waits for each step
and notes when it ends; the loop is elsewhere at that moment.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds from the end of the step before to the end of this one, without what was excluded.

    device: a step was handed over and not yet ended.  data: nothing was, and the loop was waiting for a batch.
    host: nothing was, and the loop was doing anything else.
    """

    device: float
    data: float
    host: float

    @property
    def total(self) -> float:
        return self.device + self.data + self.host


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOnDevice:
    """A step that was handed over, and what came between it and the one before."""

    handed_over: float
    data_wait: tuple[float, float]  # from when to when
    excluded: float
    ended: concurrent.futures.Future[float]


class StepClock:
    """Times the steps of a loop: `waiting_for_data`, `hand_over`, and later, in the same order, `read`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """now: seconds."""
        self._now = now
        self._free_since = now()  # when the device ended the last step that was read
        self._data_wait = (self._free_since, self._free_since)
        self._excluded = 0.0
        # Nobody shuts it down: that would wait for a step that may hang. It ends with this object.
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="step_clock")

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a batch."""
        started = self._now()
        yield
        self._data_wait = (started, self._now())

    def exclude(self, seconds: float) -> None:
        """Takes out time that was no part of a step, and in which the device had none."""
        self._excluded += seconds

    def hand_over(self, outputs: Any, *, at: float) -> StepOnDevice:
        """Notes a step that the device was given.  outputs: some arrays that it makes.  at: when, by the clock."""
        step = StepOnDevice(
            handed_over=at,
            data_wait=self._data_wait,
            excluded=self._excluded,
            ended=self._watcher.submit(self._wait_for, outputs),
        )
        self._data_wait, self._excluded = (at, at), 0.0
        return step

    def read(self, step: StepOnDevice) -> StepTimes:
        """Waits for the end of a step; raises what went wrong on the device."""
        ended, free_since = step.ended.result(), self._free_since
        self._free_since = ended
        idle = max(0.0, step.handed_over - free_since - step.excluded)
        data = max(0.0, step.data_wait[1] - max(step.data_wait[0], free_since))
        data = min(data, idle)
        return StepTimes(
            device=ended - max(step.handed_over, free_since),
            data=data,
            host=idle - data,
        )

    def _wait_for(self, outputs: Any) -> float:
        jax.block_until_ready(outputs)
        return self._now()
