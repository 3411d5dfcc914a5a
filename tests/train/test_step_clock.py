"""What the clock of steps calls computing and waiting, with a clock and steps that the test moves."""

from __future__ import annotations

import threading

import pytest

from pgdist.train.step_clock import StepClock, StepOnDevice, StepTimes


class Now:
    """Seconds that pass when a test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Output:
    """An array that is ready when a test says so, as `jax.block_until_ready` knows one."""

    def __init__(self) -> None:
        self._ready = threading.Event()

    def block_until_ready(self) -> Output:
        assert self._ready.wait(10)
        return self

    def end(self, step: StepOnDevice) -> None:
        self._ready.set()
        step.ended.result(10)  # the clock has seen it


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def clock(now) -> StepClock:
    return StepClock(now)


def run_step(clock: StepClock, now: Now, *, data: float = 0.0, host: float = 0.0, device: float) -> StepTimes:
    """A step that is handed over when the one before has ended."""
    with clock.waiting_for_data():
        now.seconds += data
    now.seconds += host
    output = Output()
    step = clock.hand_over(output, at=now.seconds)
    now.seconds += device
    output.end(step)
    return clock.read(step)


def test_time_without_a_step_is_of_data_or_of_the_host(clock, now):
    assert run_step(clock, now, data=2.0, host=1.0, device=5.0) == StepTimes(device=5.0, data=2.0, host=1.0)
    assert run_step(clock, now, data=0.5, device=4.0) == StepTimes(device=4.0, data=0.5, host=0.0)


def test_what_the_host_does_while_the_device_computes_costs_nothing(clock, now):
    first, second = Output(), Output()
    one = clock.hand_over(first, at=now.seconds)
    with clock.waiting_for_data():
        now.seconds += 3.0
    now.seconds += 1.0
    two = clock.hand_over(second, at=now.seconds)
    now.seconds += 6.0
    first.end(one)
    now.seconds += 10.0
    second.end(two)

    assert clock.read(one) == StepTimes(device=10.0, data=0.0, host=0.0)
    assert clock.read(two) == StepTimes(device=10.0, data=0.0, host=0.0)


def test_only_the_part_of_a_wait_counts_in_which_the_device_had_nothing(clock, now):
    first, second = Output(), Output()
    one = clock.hand_over(first, at=now.seconds)
    with clock.waiting_for_data():
        now.seconds += 3.0
        first.end(one)
        now.seconds += 2.0
    now.seconds += 0.5
    two = clock.hand_over(second, at=now.seconds)
    now.seconds += 4.0
    second.end(two)

    assert clock.read(one) == StepTimes(device=3.0, data=0.0, host=0.0)
    assert clock.read(two) == StepTimes(device=4.0, data=2.0, host=0.5)


def test_what_is_excluded_counts_nowhere(clock, now):
    run_step(clock, now, device=1.0)
    now.seconds += 7.0
    clock.exclude(7.0)

    times = run_step(clock, now, data=1.0, host=1.0, device=2.0)

    assert times == StepTimes(device=2.0, data=1.0, host=1.0) and times.total == 4.0
    assert run_step(clock, now, device=2.0).total == 2.0


def test_what_goes_wrong_on_the_device_is_raised_where_the_step_is_read(clock, now):
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    step = clock.hand_over(Broken(), at=0.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        clock.read(step)
