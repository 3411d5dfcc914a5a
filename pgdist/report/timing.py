"""Where the time of a run went, from the `time/...` metrics and the clock of metrics.jsonl."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pgdist.report.data import Metrics

KINDS = {  # metric -> what it is called in the report
    "time/step_seconds": "training steps",
    "time/data_wait_seconds": "waiting for data",
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
    measured."""

    shares: tuple[Share, ...]
    total: float
    examples_per_second: float | None  # medians: the first step compiles, and would spoil a mean
    tokens_per_second: float | None
    step_seconds: float | None


def summarize_timing(metrics: Metrics) -> Timing:
    """Seconds of each kind over the run."""
    seconds = {name: sum(metrics.values(metric)) for metric, name in KINDS.items() if metrics.values(metric)}
    if seconds:
        seconds["other"] = max(0.0, _time_between_lines(metrics) - sum(seconds.values()))
    total = sum(seconds.values())
    return Timing(
        shares=tuple(Share(name=n, seconds=s, share=s / total if total else 0.0) for n, s in seconds.items()),
        total=total,
        examples_per_second=_median(metrics, "train/examples_per_second"),
        tokens_per_second=_median(metrics, "train/tokens_per_second"),
        step_seconds=_median(metrics, "time/step_seconds"),
    )


def run_seconds(metrics: Metrics) -> float | None:
    """From the start of the first step that was written to the last line; None without lines."""
    if not metrics.times:
        return None
    return max(_time_between_lines(metrics), sum(sum(metrics.values(metric)) for metric in KINDS))


def _time_between_lines(metrics: Metrics) -> float:
    times = [time for _, time in metrics.times]
    return max(times) - min(times) if times else 0.0


def _median(metrics: Metrics, name: str) -> float | None:
    values = metrics.values(name)
    return statistics.median(values) if values else None
