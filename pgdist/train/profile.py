"""Profiles of chosen steps, for xprof, TensorBoard and Perfetto.

A trace holds whole steps and no others': the device is let run dry before the first and after the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging

from pgdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfiledSteps:
    """first: the step to begin with, numbered from 1 as in metrics.jsonl.  count: of steps, in a row."""

    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def check(self, total_steps: int) -> None:
        """Raises ConfigError where a run of so many steps does not have them."""
        if self.last > total_steps:
            raise ConfigError(
                f"--profile={self.first}:{self.count}: expected steps that the run has, found step {self.last} of "
                f"{total_steps} (config.steps). Profile earlier ones; from step 3 on they are like any other."
            )


def parse_profiled_steps(text: str) -> ProfiledSteps:
    """Of "STEP:COUNT", as --profile takes it; raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 1:
        raise ConfigError(
            f"--profile={text}: expected STEP:COUNT, two whole numbers of at least 1, such as 10:3 for the steps 10, "
            "11 and 12."
        )
    return ProfiledSteps(first=int(match[1]), count=int(match[2]))


class Profiler:
    """Traces the chosen steps of a run into a folder; `close()` ends a trace that is not complete."""

    def __init__(self, steps: ProfiledSteps, folder: Path) -> None:
        self._steps = steps
        self._folder = folder
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, number: int, *, drain: Callable[[], None]) -> Iterator[None]:
        """Around what hands a step to the device.  drain: returns when the device has done all that it was given."""
        if not self._steps.first <= number <= self._steps.last:
            yield
            return
        if not self._is_tracing:
            drain()
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._steps.last:
            drain()
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken; a full disk costs the trace, not the run."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
            logging.info("Profile of the steps from %d on: %s", self._steps.first, self._folder)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            logging.warning("The profile could not be written: %s", error)


class NoProfiler:
    """Traces nothing."""

    @contextlib.contextmanager
    def step(self, number: int, *, drain: Callable[[], None]) -> Iterator[None]:
        """See `Profiler`."""
        del number, drain
        yield

    def close(self) -> None:
        """See `Profiler`."""
