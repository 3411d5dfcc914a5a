"""Where the time of a run went, from the `time/...` metrics and the clock of metrics.jsonl."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pgdist.report import formats
from pgdist.report.data import Metrics, Run

STEPS = "training steps"
KINDS = {  # metric -> what it is called in the report
    "time/step_seconds": STEPS,
    "time/data_wait_seconds": "waiting for data",
    "time/host_wait_seconds": "waiting for the host",
    "time/compile_seconds": "compiling",
    "time/loading_seconds": "loading",
    "time/checkpoint_seconds": "checkpoints",
    "time/evaluation_seconds": "evaluation",
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A kind of work with its seconds and its share of all that is accounted for."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """`total` is the sum of the shares: what was measured, and what lies between the lines without being
    measured.

    goodput: the share of steps that led to the last state; those that a crash made vain are in "other".
    peak_memory: bytes, of one device at most.
    """

    shares: tuple[Share, ...]
    total: float
    goodput: float | None
    examples_per_second: float | None  # medians: a pause would spoil a mean
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None
    mfu: float | None
    step_seconds: float | None
    peak_memory: float | None


def summarize_timing(metrics: Metrics) -> Timing:
    """Seconds of each kind over the run."""
    seconds = {name: sum(metrics.values(metric)) for metric, name in KINDS.items() if metrics.values(metric)}
    if seconds:
        seconds["other"] = max(0.0, _wall_time(metrics) - sum(seconds.values()))
    total = sum(seconds.values())
    return Timing(
        shares=tuple(Share(name=n, seconds=s, share=s / total if total else 0.0) for n, s in seconds.items()),
        total=total,
        goodput=seconds.get(STEPS, 0.0) / total if total else None,
        examples_per_second=_median(metrics, "train/examples_per_second"),
        tokens_per_second=_median(metrics, "train/tokens_per_second"),
        tokens_per_second_per_device=_median(metrics, "train/tokens_per_second_per_device"),
        mfu=_median(metrics, "train/mfu"),
        step_seconds=_median(metrics, "time/step_seconds"),
        peak_memory=max(metrics.values("memory/peak_bytes"), default=None),
    )


def describe_timing(run: Run) -> str:
    """The shares in one line, largest first, and what else is known of the run's speed; for the log."""
    timing = summarize_timing(run.metrics)
    if not timing.shares:
        return "Time: nothing was measured."
    shares = sorted(timing.shares, key=lambda share: -share.seconds)
    parts = [f"{share.name} {formats.percent(share.share)}" for share in shares if share.share >= 0.0005]
    text = f"Time: {formats.duration(timing.total)}: {', '.join(parts)}."
    if timing.mfu is not None:
        text += f" MFU {formats.percent(timing.mfu)} in the median step."
    if timing.peak_memory is not None:
        text += f" Memory of a device: {formats.size(timing.peak_memory)} at most."
    return text


def run_seconds(metrics: Metrics) -> float | None:
    """From the beginning to the last line; None without lines."""
    if not metrics.times:
        return None
    return max(_wall_time(metrics), sum(sum(metrics.values(metric)) for metric in KINDS))


def _wall_time(metrics: Metrics) -> float:
    """Between the first and the last line, and what the lines of the first step say they took before."""
    if not metrics.times:
        return 0.0
    first_step = metrics.times[0][0]
    before = [value for metric in KINDS for step, value in metrics.points(metric) if step == first_step]
    times = [time for _, time in metrics.times]
    return max(times) - min(times) + sum(value for value in before if math.isfinite(value))


def _median(metrics: Metrics, name: str) -> float | None:
    values = metrics.values(name)
    return statistics.median(values) if values else None
