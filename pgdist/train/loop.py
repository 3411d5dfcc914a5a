"""The training loop: what happens at each step, in the order that keeps a run safe.

Metrics are read one step late, so that the device always has the next step queued while the host looks at
the last one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from pgdist import cluster, heartbeat
from pgdist.checkpoint import Checkpoints
from pgdist.chips import peak_flops
from pgdist.data.bad_records import BadRecordLog, BadShare
from pgdist.data.loader import HostBatch
from pgdist.errors import DivergedError, Preempted
from pgdist.mesh import batch_sharding, put_batch
from pgdist.stop import StopVoted
from pgdist.telemetry import MetricWriter
from pgdist.train.profile import NoProfiler, Profiler
from pgdist.train.state import TrainState
from pgdist.train.step import TrainStep
from pgdist.train.step_clock import StepClock, StepOnDevice, StepTimes

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything a run's loop touches. Null objects stand for what a run does without.

    batches: this process's rows of each step from `state.step` on.  evaluate: called with (updates made,
    state); returns metrics, or raises StopVoted in all processes.  should_stop: asked before every update with
    the number made, in each process for itself: one True anywhere stops all after the same update, the one
    after the next.  sequence_length: tokens that the decoder reads an example, image and text.  flops_per_example:
    of the model, see `pgdist.models.flops`.
    """

    step: TrainStep
    frozen: PyTree
    mesh: Mesh
    batches: Iterator[HostBatch]
    batch_size: int
    total_steps: int
    base_learning_rate: float
    sequence_length: int
    flops_per_example: float
    writer: MetricWriter
    checkpoints: Checkpoints
    checkpoint_every: int
    evaluate: Callable[[int, TrainState], dict[str, float]]
    evaluate_every: int
    evaluate_first: bool
    should_stop: Callable[[int], bool]
    bad_records: BadRecordLog
    bad_share: BadShare
    patience: int
    profiler: Profiler | NoProfiler

    def run(self, state: TrainState) -> TrainState:
        """Trains to `total_steps` updates; returns the last state.

        Raises DivergedError after `patience` + 1 steps in a row that are not finite, DataError above the
        allowed share of bad records, Preempted after a stop was asked for and the state saved.
        """
        first = int(state.step)
        log = _StepLog(self)
        if cluster.any_process(self.should_stop(first)):  # asked for while all was loading
            self._stop(first, state, log)
        if self.evaluate_first:
            self._evaluate(first, state, log)
        heartbeat.beat("compiling", step=first)
        for step in range(first, self.total_steps):
            done = step + 1
            with self.profiler.step(done, drain=log.wait):
                batch = self._next_batch(log, wishes_to_stop=self.should_stop(step))
                state = self._dispatch(step, state, batch, log, is_first=step == first)
            if log.stop_is_voted and done < self.total_steps:
                self._stop(done, state, log)
            if done % self.checkpoint_every == 0 or done == self.total_steps:
                # Look at the loss, then save, and only then fetch the next batch: what is on disk is never a
                # state whose loss nobody has seen.
                log.flush()
                self._save(done, state, log)
            if done == self.total_steps or (self.evaluate_every and done % self.evaluate_every == 0):
                log.flush()
                self._evaluate(done, state, log)
        return state

    def _dispatch(
        self, step: int, state: TrainState, batch: dict[str, jax.Array], log: _StepLog, *, is_first: bool
    ) -> TrainState:
        """Hands a step to the device; the first one of a run waits for its program."""
        handed_over = time.perf_counter()
        state, metrics = self.step(state, self.frozen, batch)
        if is_first:
            started, handed_over = handed_over, time.perf_counter()
            log.clock.exclude(handed_over - started)
            self.writer.write(step, {"time/compile_seconds": handed_over - started})
        log.add(step, metrics, handed_over=handed_over)
        return state

    def _next_batch(self, log: _StepLog, *, wishes_to_stop: bool) -> dict[str, jax.Array]:
        with log.clock.waiting_for_data():
            batch = next(self.batches)
        for record in self.bad_records.add(batch.bad):
            logging.warning("Bad record, its row is masked: %s", record)
        arrays = {name: array for name, array in batch.arrays.items() if name != "index"}
        arrays["stop"] = np.full(len(batch.arrays["index"]), wishes_to_stop, np.float32)
        return put_batch(arrays, sharding=batch_sharding(self.mesh), batch_size=self.batch_size)

    def _evaluate(self, step: int, state: TrainState, log: _StepLog) -> None:
        heartbeat.beat("evaluating", step=step)
        started = time.perf_counter()
        try:
            found = self.evaluate(step, state)
        except StopVoted:
            self._stop(step, state, log)
        seconds = time.perf_counter() - started
        log.clock.exclude(seconds)
        self.writer.write(step, found | {"time/evaluation_seconds": seconds})
        heartbeat.beat("stepping")

    def _stop(self, step: int, state: TrainState, log: _StepLog) -> NoReturn:
        log.flush()
        self._save(step, state, log)
        heartbeat.beat("saving")
        self.checkpoints.wait()
        raise Preempted(
            f"Stopped as asked after step {step} of {self.total_steps}; the state is saved: "
            "start again to go on."
        )

    def _save(self, step: int, state: TrainState, log: _StepLog) -> None:
        heartbeat.beat("saving", step=step)
        started = time.perf_counter()
        self.checkpoints.save(step, state)
        seconds = time.perf_counter() - started
        log.clock.exclude(seconds)
        self.writer.write(step, {"time/checkpoint_seconds": seconds})
        heartbeat.beat("stepping")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    """A step that was handed over and whose metrics nobody has read.  step: updates made before it."""

    step: int
    metrics: dict[str, jax.Array]
    on_device: StepOnDevice


class _StepLog:
    """The metrics of the step before, waiting to be read while the device works on the next one."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._pending: _Pending | None = None
        self._bad_steps = 0
        self._told_of_truncation = False
        peak = peak_flops(loop.mesh.devices.flat[0])
        self._peak_flops = None if peak is None else peak * loop.mesh.size
        self.clock = StepClock()
        self.stop_is_voted = False

    def add(self, step: int, metrics: dict[str, jax.Array], *, handed_over: float) -> None:
        """Queues the metrics of a step that was just dispatched and reads those of the one before.

        handed_over: when it was dispatched, by the clock.
        """
        on_device = self.clock.hand_over(metrics, at=handed_over)
        self.flush()
        self._pending = _Pending(step=step, metrics=metrics, on_device=on_device)

    def wait(self) -> None:
        """Waits for what is pending. It is not read: process 0, which profiles, would learn earlier of a vote to stop
        than the others.
        """
        if self._pending is not None:
            self._pending.on_device.ended.result()

    def flush(self) -> None:
        """Reads what is pending, which waits for that step; writes it and judges it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step = pending.step
        times = self.clock.read(pending.on_device)
        found = {name: float(np.asarray(value)) for name, value in pending.metrics.items()}
        heartbeat.beat("stepping", step=step + 1)
        self.stop_is_voted |= found["stop"] > 0
        self._loop.writer.write(step + 1, self._describe(found, times))
        self._judge(step, found)

    def _describe(self, found: dict[str, float], times: StepTimes) -> dict[str, float]:
        loop = self._loop
        examples_per_second = found["examples"] / times.total
        tokens_per_second = examples_per_second * loop.sequence_length
        described = {
            "train/loss": found["loss"],
            "train/learning_rate": found["relative_rate"] * loop.base_learning_rate,
            "train/grad_norm": found["grad_norm"],
            "train/examples_per_second": examples_per_second,
            "train/tokens_per_second": tokens_per_second,
            "train/tokens_per_second_per_device": tokens_per_second / loop.mesh.size,
            "train/masked_rows": loop.batch_size - found["examples"],
            "train/truncated_rows": found["truncated"],
            "time/step_seconds": times.device,
            "time/data_wait_seconds": times.data,
            "time/host_wait_seconds": times.host,
        }
        if self._peak_flops is not None:
            described["train/mfu"] = examples_per_second * loop.flops_per_example / self._peak_flops
        if (peak := _peak_memory(loop.mesh.local_devices)) is not None:
            described["memory/peak_bytes"] = peak
        return described

    def _judge(self, step: int, found: dict[str, float]) -> None:
        loop = self._loop
        loop.bad_share.add(masked_rows=loop.batch_size - round(found["examples"]), rows=loop.batch_size)
        if found["truncated"] and not self._told_of_truncation:
            self._told_of_truncation = True  # once; train/truncated_rows goes on counting
            logging.warning(
                "Step %d: %d of %d texts are longer than config.data.text_length and were cut.",
                step + 1,
                found["truncated"],
                loop.batch_size,
            )
        self._bad_steps = 0 if found["finite"] else self._bad_steps + 1
        if self._bad_steps:
            logging.warning(
                "Step %d: loss %s, gradient norm %s; its update is left out.",
                step + 1,
                found["loss"],
                found["grad_norm"],
            )
        if self._bad_steps > loop.patience:
            raise DivergedError(
                "Training diverged: the loss, its gradients or the parameters they lead to were not finite "
                f"in {self._bad_steps} steps in a row, up to step {step + 1} (loss {found['loss']}, gradient "
                f"norm {found['grad_norm']}). Nothing of them was saved. Lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm, and start again from the "
                "last checkpoint."
            )


def _peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes that one of the devices has held since the process began; None where they do not tell."""
    found = [device.memory_stats() or {} for device in devices]
    return max((stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats), default=None)
