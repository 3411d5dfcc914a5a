"""From a workdir to report.html: reads the files, prepares each section, fills the template.

The page holds everything it shows. Texts from data, names of images and values of the config are strangers'
words: the template escapes them, and the page's own content security policy lets no script but ours run and
nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pgdist.report import formats
from pgdist.report.charts import Line, line_chart
from pgdist.report.data import Metrics, Parameter, Run, flatten_settings, load_run
from pgdist.report.page import make_environment, write_page
from pgdist.report.predictions import build_grid
from pgdist.report.timing import run_seconds, summarize_timing
from pgdist.report.tokens import describe_tokens

MOST_EXAMPLES = 8
MOST_BAD_RECORDS = 50
NOT_TASK_METRICS = ("loss", "token_accuracy")


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write workdir/report.html from the other files of the workdir, whichever there are, and return its
    path.

    The file is replaced as a whole, and equal files give an equal page. Raises OSError where the workdir
    cannot be written; what its files hold is never a reason to raise.
    """
    workdir = Path(workdir)
    return write_page(workdir / "report.html", render_report(load_run(workdir)))


def render_report(run: Run) -> str:
    """The page as text."""
    environment = make_environment()
    script = environment.get_template("script.js.jinja").render()
    metric = main_metric(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        title=run.workdir.resolve().name,
        style=Markup(environment.get_template("style.css.jinja").render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=describe_run(run),
        tiles=summarize_run(run, metric=metric),
        warnings=find_warnings(run),
        loss_charts=draw_loss_charts(run.metrics),
        speed_charts=draw_speed_charts(run.metrics),
        examples=[(example, describe_tokens(example)) for example in run.examples[:MOST_EXAMPLES]],
        metric=metric,
        grid=build_grid(run, metric=metric),
        timing=summarize_timing(run.metrics),
        bad_records=run.bad_records[:MOST_BAD_RECORDS],
        masked_rows=sum(run.metrics.values("train/masked_rows")),
        truncated_rows=sum(run.metrics.values("train/truncated_rows")),
        totals=[
            total_parameters("trainable", (p for p in run.parameters if p.trainable)),
            total_parameters("frozen", (p for p in run.parameters if not p.trainable)),
            total_parameters("all", run.parameters),
        ],
        settings=list(flatten_settings(run.config)),
        environment=list(flatten_settings(run.environment)),
    )


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure of the headline; `first` is where it started, None where that says nothing."""

    label: str
    value: str
    first: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Total:
    """Sums over some of the parameters."""

    name: str
    arrays: int
    size: int
    bytes: int


def main_metric(run: Run) -> str | None:
    """The task's metric: the configured one, else the first that was written or that a prediction has."""
    names = task_metrics(run)
    configured = run.setting("eval.metric")
    if isinstance(configured, str) and (configured in names or not names):
        return configured
    return names[0] if names else None


def task_metrics(run: Run) -> list[str]:
    """Names of all task metrics in the run, without "validation/"."""
    logged = [n.removeprefix("validation/") for n in run.metrics.series if n.startswith("validation/")]
    scored = [name for e in run.evaluations[-1:] for p in e.predictions[:1] for name in p.scores]
    return [name for name in dict.fromkeys(logged + scored) if name not in NOT_TASK_METRICS]


def describe_run(run: Run) -> list[tuple[str, str]]:
    """What ran, as far as the config tells: pairs of a label and a short text."""
    facts = []
    if preset := run.setting("model.preset"):
        init = run.setting("init")
        facts.append(("model", f"{preset}, from {os.path.basename(str(init)) if init else 'random weights'}"))
    if data := run.setting("data.train"):
        facts.append(("data", os.path.basename(str(data))))
    if optimizer := run.setting("optimizer.name"):
        rate, schedule = run.setting("optimizer.learning_rate", "?"), run.setting("schedule.name", "?")
        facts.append(("optimizer", f"{optimizer}, learning rate {rate}, {schedule}"))
    if batch_size := run.setting("batch_size"):
        facts.append(("batch", f"{batch_size} examples"))
    if points := run.metrics.times:
        facts.append(("steps", f"{points[-1][0]} of {run.setting('steps', '?')}"))
        facts.append(("last line", formats.moment(points[-1][1])))
    return facts


def summarize_run(run: Run, *, metric: str | None) -> list[Tile]:
    """The figures of the headline; those that no file tells are left out."""
    named = [("train/loss", "training loss"), ("validation/loss", "validation loss")]
    if metric:
        named.insert(0, (f"validation/{metric}", metric.replace("_", " ")))
    tiles = []
    for name, label in named:
        if points := run.metrics.points(name):
            (first_step, first), (last_step, last) = points[0], points[-1]
            start = formats.number(first) if len(points) > 1 else None
            detail = f"steps {first_step} to {last_step}" if len(points) > 1 else f"step {last_step}"
            tiles.append(Tile(label=label, value=formats.number(last), first=start, detail=detail))
    if (seconds := run_seconds(run.metrics)) is not None:
        rates = run.metrics.values("train/examples_per_second")
        detail = f"{formats.number(statistics.median(rates))} examples/s" if rates else ""
        tiles.append(Tile(label="duration", value=formats.duration(seconds), detail=detail))
    if run.parameters:
        trainable = sum(p.size for p in run.parameters if p.trainable)
        everything = sum(p.size for p in run.parameters)
        detail = f"of {formats.count(everything)} parameters"
        tiles.append(Tile(label="trained", value=formats.count(trainable), detail=detail))
    return tiles


def find_warnings(run: Run) -> list[str]:
    """What a reader should know before looking at anything else."""
    warnings = []
    points, steps = run.metrics.points("train/loss"), run.setting("steps")
    if points and isinstance(steps, int) and points[-1][0] < steps:
        end = points[-1][0]
        warnings.append(f"The metrics end at step {end} of {steps}: the run goes on or was cut short.")
    if bad := len(points) - len(run.metrics.values("train/loss")):
        warnings.append(f"The training loss was not a finite number in {bad} of {len(points)} logged steps.")
    if run.bad_records:
        records = "1 record" if len(run.bad_records) == 1 else f"{len(run.bad_records)} records"
        warnings.append(f"{records} could not be used; see “Bad records”.")
    return warnings


def draw_loss_charts(metrics: Metrics) -> list[Markup]:
    """Loss, task scores, learning rate and gradient norm, those that there are."""
    scores = [name for name in metrics.series if name.startswith("validation/") and name != "validation/loss"]
    charts = [
        line_chart(
            [
                Line(name="training", points=metrics.points("train/loss"), color=1),
                Line(name="validation", points=metrics.points("validation/loss"), color=2),
            ],
            title="Loss",
        ),
        line_chart(
            [
                Line(name=_label(name), points=metrics.points(name), color=color)
                for color, name in zip(itertools.cycle((2, 3, 4, 5, 1)), scores, strict=False)
            ],
            title="Validation scores",
        ),
        _single(metrics, "train/learning_rate", title="Learning rate", color=4),
        _single(metrics, "train/grad_norm", title="Gradient norm", color=5),
    ]
    return [chart for chart in charts if chart]


def draw_speed_charts(metrics: Metrics) -> list[Markup]:
    """Throughput."""
    charts = [
        _single(metrics, "train/examples_per_second", title="Examples per second", color=1),
        _single(metrics, "train/tokens_per_second", title="Tokens per second", color=3),
        _single(metrics, "train/mfu", title="Model FLOPs utilisation", color=4),
    ]
    return [chart for chart in charts if chart]


def total_parameters(name: str, parameters: Iterable[Parameter]) -> Total:
    """Number of arrays, of scalars and of bytes."""
    chosen = list(parameters)
    return Total(
        name=name,
        arrays=len(chosen),
        size=sum(parameter.size for parameter in chosen),
        bytes=sum(parameter.bytes for parameter in chosen),
    )


def _single(metrics: Metrics, name: str, *, title: str, color: int) -> Markup:
    return line_chart([Line(name="", points=metrics.points(name), color=color)], title=title)


def _label(metric: str) -> str:
    return metric.rpartition("/")[2].replace("_", " ")
