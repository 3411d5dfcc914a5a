"""The report of a prediction: one HTML file of images, prompts and answers, with the boxes that are written in them.

It is made of the rows that prediction writes, so that of a job which was stopped and gone on with it shows all. As in
the report of a run, texts are strangers' words, the page holds all that it shows, and no row can stop it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pgdist.data.locations import find_boxes
from pgdist.report.data import as_number, as_text, parse_row, read_prediction
from pgdist.report.page import make_environment, write_page
from pgdist.report.predictions import Answer, compare_with_truth
from pgdist.report.thumbnails import find_thumbnail

MOST_INPUTS = 500  # some ten megabytes of images
MOST_OTHERS = 15  # answers to an input beside the first
MOST_BOXES = 100  # in a text
MOST_CHARACTERS = 4000  # of a text
_COLORS = 7  # that the style has


@dataclass(frozen=True, kw_only=True)
class DrawnBox:
    """In percent of the image.  color: 1 to 7, the same for boxes with the same label.  is_true: of the truth."""

    x: float
    y: float
    width: float
    height: float
    label: str
    color: int
    is_true: bool


@dataclass(frozen=True, kw_only=True)
class Other:
    """An answer beside the first.  logprob: of all of it in nats, None where the row has none."""

    text: str
    logprob: float | None


@dataclass(frozen=True, kw_only=True)
class Input:
    """An image and what was answered; or why nothing was (error).

    image: a data URI, None where there is none (image_problem).  score: None where there is no truth.
    """

    index: int
    image: str | None
    image_problem: str
    image_name: str
    prefix: str
    truths: tuple[str, ...]
    answer: Answer
    logprob: float | None
    score: float | None
    others: tuple[Other, ...]
    boxes: tuple[DrawnBox, ...]
    error: str


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Of all rows, those included that are not shown.  score: the mean of `scored` rows, None without any."""

    inputs: int = 0
    failed: int = 0
    scored: int = 0
    sum_of_scores: float = 0.0

    def add(self, row: Mapping[str, Any]) -> Totals:
        """These and another row."""
        score = _finite(row.get("score"))
        return Totals(
            inputs=self.inputs + 1,
            failed=self.failed + (row.get("error") is not None),
            scored=self.scored + (score is not None),
            sum_of_scores=self.sum_of_scores + (score or 0.0),
        )

    @property
    def score(self) -> float | None:
        return self.sum_of_scores / self.scored if self.scored else None


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file of predictions, one after the other; lines that are none are left out."""
    with open(path, "rb") as file:
        yield from filter(None, map(parse_row, file))


def write_predictions_report(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    *,
    image_root: str | os.PathLike[str],
    title: str,
) -> Path:
    """Writes the page as a whole and returns its path.

    rows: index, image, prefix, suffix, prediction, and where they are known predictions, logprob, score, error; those
    of a file by `read_rows`. The first MOST_INPUTS are shown, all are counted.  image_root: what the rows' image paths
    are relative to. Raises OSError where the page cannot be written; what rows hold is never a reason to raise.
    """
    rows, totals = iter(rows), Totals()
    inputs = []
    for number, row in enumerate(itertools.islice(rows, MOST_INPUTS)):
        inputs.append(_read_input(row, number=number, image_root=Path(image_root)))
        totals = totals.add(row)
    for row in rows:
        totals = totals.add(row)
    environment = make_environment()
    page = environment.get_template("answers.html.jinja").render(
        title=title,
        style=Markup(environment.get_template("style.css.jinja").render()),
        inputs=inputs,
        totals=totals,
    )
    return write_page(path, page)


def _read_input(row: Mapping[str, Any], *, number: int, image_root: Path) -> Input:
    prediction = read_prediction(_shortened(row), number=number)
    error = as_text(row.get("error"))[:MOST_CHARACTERS]
    image, problem = (None, "") if error else find_thumbnail(prediction.image, folders=(image_root,))
    texts, logprobs = _list(row.get("predictions")), _list(row.get("logprob"))
    others = [
        Other(text=as_text(text)[:MOST_CHARACTERS], logprob=_finite(logprob))
        for text, logprob in itertools.zip_longest(texts[1:], logprobs[1 : len(texts)])
    ]
    return Input(
        index=prediction.index,
        image=image,
        image_problem=problem,
        image_name=prediction.image,
        prefix=prediction.prefix,
        truths=prediction.truths,
        answer=compare_with_truth(prediction, metric="score"),
        logprob=_finite(logprobs[0]) if logprobs else None,
        score=_finite(row.get("score")),
        others=tuple(others[:MOST_OTHERS]),
        boxes=_draw(prediction.text, truth=prediction.truths[0] if prediction.truths else ""),
        error=error,
    )


def _shortened(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: as_text(row.get(name))[:MOST_CHARACTERS] for name in ("image", "prefix", "prediction")}
    suffixes = [as_text(text)[:MOST_CHARACTERS] for text in _list(row.get("suffix"))]
    return {**row, **texts, "suffix": suffixes}


def _draw(answer: str, *, truth: str) -> tuple[DrawnBox, ...]:
    """The boxes of both, those of the truth below the others."""
    found = [
        (box, is_true)
        for text, is_true in ((truth, True), (answer, False))
        for box in find_boxes(text)[:MOST_BOXES]
    ]
    labels = list(dict.fromkeys(box.label for box, _ in found))
    return tuple(
        DrawnBox(
            x=100 * box.x0,
            y=100 * box.y0,
            width=100 * (box.x1 - box.x0),
            height=100 * (box.y1 - box.y0),
            label=box.label,
            color=1 + labels.index(box.label) % _COLORS,
            is_true=is_true,
        )
        for box, is_true in found
    )


def _list(value: Any) -> list[Any]:
    """A list as it is, a lone value as a list, null as an empty one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _finite(value: Any) -> float | None:
    """None where it is no finite number."""
    number = as_number(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else None
