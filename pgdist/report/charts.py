"""Line charts as inline SVG: axes, ticks, a legend with values, and nothing that needs a library.

A line of many points is drawn as the mean of each of a few hundred buckets over a band from their least to
their greatest value, so a chart is small, and shows trend and spread, however long the run was.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from pgdist.report import formats
from pgdist.report.data import Points

WIDTH, HEIGHT = 480, 230  # SVG units, about CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 460, 10, 196  # of the plotting area
MOST_POINTS = 240
MOST_MARKS = 20  # of values that are not finite
MARKED_POINTS = 24  # a line of at most so many points shows each of them
LOG_RATIO = 50.0  # greatest over least value from which the axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line; `color` is a number of the palette in the style sheet, a line alone needs no `name`."""

    name: str
    points: Points
    color: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Ticks, and where a value lies between the ends of the axis: 0 at the lower one, 1 at the upper one."""

    ticks: tuple[float, ...]
    place: Callable[[float], float]


@dataclass(frozen=True)
class _Bucket:
    step: int
    mean: float
    low: float
    high: float


def line_chart(lines: Sequence[Line], *, title: str) -> Markup:
    """A <figure> with the lines over their steps, or nothing where no line has a finite value."""
    lines = [replace(line, points=_drawable(line.points)) for line in lines if line.points]
    finite = [value for line in lines for _, value in line.points if math.isfinite(value)]
    if not finite:
        return Markup("")
    steps = [step for line in lines for step, _ in line.points]
    x_axis = _linear_axis(min(steps), max(steps), tight=True)
    y_axis = _value_axis(min(finite), max(finite))

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * x_axis.place(step)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * y_axis.place(value)

    parts = [_y_tick(value, y(value)) for value in y_axis.ticks]
    parts += [_x_tick(value, x(value)) for value in x_axis.ticks if value == int(value)]
    parts.append(f'<text class="label" x="{RIGHT + 10}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    legend = []
    for line in lines:
        buckets = _thin(line.points)
        parts.append(_draw(buckets, color=line.color, marked=len(line.points) <= MARKED_POINTS, x=x, y=y))
        nonfinite = [step for step, value in line.points if not math.isfinite(value)]
        parts += [_mark_nonfinite(step, x(step)) for step in nonfinite[:MOST_MARKS]]
        legend.append(_legend_entry(line, buckets))
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/>')
    return Markup(
        f'<figure class="chart" data-left="{x(min(steps)):.1f}" data-right="{x(max(steps)):.1f}" '
        f'data-first="{min(steps)}" data-last="{max(steps)}" data-width="{WIDTH}">'
        f"<figcaption><b>{escape(title)}</b> {''.join(legend)}<span class='at'></span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def _drawable(points: Points) -> Points:
    """Values beyond what arithmetic on axes can take become zero or not a number."""
    return tuple(
        (step, math.nan if not abs(value) < 1e100 else 0.0 if abs(value) < 1e-100 else value)
        for step, value in points
    )


def _thin(points: Points) -> list[_Bucket]:
    """At most MOST_POINTS buckets of neighbours; the mean of one is finite if all its values are."""
    width = math.ceil(len(points) / MOST_POINTS)
    buckets = []
    for start in range(0, len(points), width):
        chunk = points[start : start + width]
        values = [value for _, value in chunk]
        buckets.append(_Bucket(chunk[-1][0], sum(values) / len(values), min(values), max(values)))
    return buckets


def _draw(
    buckets: Sequence[_Bucket],
    *,
    color: int,
    marked: bool,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> str:
    """The line, interrupted where it is not finite, over the band of what its buckets hold."""
    parts = []
    for finite, group in itertools.groupby(buckets, key=lambda bucket: math.isfinite(bucket.mean)):
        if not finite:
            continue
        run = list(group)
        if any(bucket.low < bucket.high for bucket in run):
            outline = [f"{x(bucket.step):.1f},{y(bucket.high):.1f}" for bucket in run]
            outline += [f"{x(bucket.step):.1f},{y(bucket.low):.1f}" for bucket in reversed(run)]
            parts.append(f'<polygon class="band c{color}" points="{" ".join(outline)}"/>')
        path = " ".join(f"{x(bucket.step):.1f},{y(bucket.mean):.1f}" for bucket in run)
        parts.append(f'<polyline class="line c{color}" points="{path}"/>')
        if marked or len(run) == 1:
            parts += [
                f'<circle class="dot c{color}" cx="{x(bucket.step):.1f}" cy="{y(bucket.mean):.1f}" r="2.6">'
                f"<title>step {bucket.step}: {formats.number(bucket.mean)}</title></circle>"
                for bucket in run
            ]
    return "".join(parts)


def _legend_entry(line: Line, buckets: Sequence[_Bucket]) -> str:
    """Name and last value; the script replaces the value by the one under the pointer, out of data-points."""
    rounded = [[bucket.step, formats.number(bucket.mean)] for bucket in buckets]
    last = formats.number(line.points[-1][1])
    return (
        f'<span class="key" data-points="{escape(json.dumps(rounded))}"><i class="c{line.color}"></i>'
        f"{escape(line.name)} <output>{last}</output></span> "
    )


def _y_tick(value: float, position: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{position:.1f}" y2="{position:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{position + 4:.1f}" text-anchor="end">'
        f"{_tick_text(value)}</text>"
    )


def _x_tick(value: float, position: float) -> str:
    return (
        f'<line class="axis" x1="{position:.1f}" x2="{position:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        f'<text class="tick" x="{position:.1f}" y="{BOTTOM + 17}" text-anchor="middle">'
        f"{_tick_text(value)}</text>"
    )


def _mark_nonfinite(step: int, position: float) -> str:
    return (
        f'<path class="nonfinite" d="M{position - 4:.1f} {TOP} h8 l-4 7 z">'
        f"<title>step {step}: not a finite number</title></path>"
    )


def _tick_text(value: float) -> str:
    if abs(value) >= 10_000 and value == int(value):
        return f"{value / 1000:g}k"
    return f"{value:.10g}".replace("e-0", "e-").replace("e+0", "e")


def _value_axis(low: float, high: float) -> Axis:
    if low > 0 and high / low > LOG_RATIO:
        return _log_axis(low, high)
    if 0 <= low < high / 2:
        low = 0.0  # a curve that comes near to zero should be seen against it
    return _linear_axis(low, high, tight=False)


def _linear_axis(low: float, high: float, *, tight: bool) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten.

    tight: the axis ends at `low` and `high`, not at the ticks around them.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
        tight = False
    spacing = 10.0 ** math.floor(math.log10((high - low) / 4))
    spacing *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (spacing * factor) <= 6)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    ticks = tuple(float(f"{index * spacing:.12g}") for index in range(first, last + 1))
    if tight:
        ticks = tuple(tick for tick in ticks if low <= tick <= high)
    else:
        low, high = first * spacing, last * spacing
    return Axis(ticks=ticks, place=lambda value: (value - low) / (high - low))


def _log_axis(low: float, high: float) -> Axis:
    """Ticks at powers of ten, or at 1, 2 and 5 times them over less than three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 6)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    lower = max((tick for tick in ticks if tick <= low), default=low)
    upper = min((tick for tick in ticks if tick >= high), default=high)
    span = math.log(upper / lower)
    return Axis(
        ticks=tuple(tick for tick in ticks if lower <= tick <= upper),
        place=lambda value: math.log(value / lower) / span,
    )
