"""The table of predictions: an example a row, an evaluation a column, beside the truth.

Evaluations may decode different numbers of examples (few on the way, all at the end). The rows shown are
those that most evaluations have in common, because the table is there to show how an answer changes.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgdist.hub import cache
from pgdist.report.data import Evaluation, Prediction, Run, raster_data_uri
from pgdist.report.thumbnails import find_thumbnail

MOST_COLUMNS = 6
MOST_ROWS = 16
MOST_CHARACTERS = 200  # of an image's name
_WORD = re.compile(r"<(?:loc|seg)\d+>|\s+|[^\s<]+|<")
_MOST_WORDS = 300  # difflib's time grows with the square


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One cell. `words` are the pieces of the text, each with whether the truth has it in this place too."""

    words: tuple[tuple[str, bool], ...]
    verdict: str  # right, partly, wrong, or unknown
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An example: its image as a data URI or the reason why there is none, and an answer for each shown
    step."""

    index: int
    image: str | None
    image_problem: str
    image_name: str
    prefix: str
    truths: tuple[str, ...]
    answers: tuple[Answer | None, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The table, and how much of everything it leaves out."""

    steps: tuple[int, ...]
    scores: tuple[float | None, ...]  # of the whole evaluation, for each of `steps`
    rows: tuple[Row, ...]
    total_evaluations: int
    total_examples: int


def build_grid(run: Run, *, metric: str | None) -> Grid:
    """metric: the task's main metric, "exact_match" or another; it decides what counts as right."""
    shown = choose_evaluations(run.evaluations)
    by_index = [{p.index: p for p in evaluation.predictions} for evaluation in shown]
    rows = []
    for index in _choose_examples(run.evaluations):
        predictions = [column.get(index) for column in by_index]
        known = next((p for p in predictions if p is not None), None)
        if known is not None:
            rows.append(_row(known, predictions, run=run, metric=metric))
    return Grid(
        steps=tuple(evaluation.step for evaluation in shown),
        scores=tuple(run.metrics.at(f"validation/{metric}", step=evaluation.step) for evaluation in shown),
        rows=tuple(rows),
        total_evaluations=len(run.evaluations),
        total_examples=len({p.index for evaluation in run.evaluations for p in evaluation.predictions}),
    )


def choose_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """All of them, or the first, the last, and evenly spaced ones between."""
    if len(evaluations) <= MOST_COLUMNS:
        return list(evaluations)
    gaps = MOST_COLUMNS - 1
    return [evaluations[round(number * (len(evaluations) - 1) / gaps)] for number in range(MOST_COLUMNS)]


def compare_words(text: str, truth: str) -> tuple[tuple[str, bool], ...]:
    """The words, spaces and location tokens of `text`, each with whether `truth` has it too, in order."""
    ours, theirs = _WORD.findall(text), _WORD.findall(truth)
    if max(len(ours), len(theirs)) > _MOST_WORDS:
        return ((text, True),)
    common = [False] * len(ours)
    for match in difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False).get_matching_blocks():
        common[match.a : match.a + match.size] = [True] * match.size
    return tuple((word, same or word.isspace()) for word, same in zip(ours, common, strict=True))


def _choose_examples(evaluations: Sequence[Evaluation]) -> list[int]:
    times_decoded = Counter(p.index for evaluation in evaluations for p in evaluation.predictions)
    # most_common keeps the order of first appearance among equals.
    return [index for index, _ in times_decoded.most_common(MOST_ROWS)]


def _row(known: Prediction, predictions: Sequence[Prediction | None], *, run: Run, metric: str | None) -> Row:
    image, problem = _thumbnail(known.image, run=run)
    return Row(
        index=known.index,
        image=image,
        image_problem=problem,
        image_name="image in the file" if raster_data_uri(known.image) else known.image[:MOST_CHARACTERS],
        prefix=known.prefix,
        truths=known.truths,
        answers=tuple(None if p is None else compare_with_truth(p, metric=metric) for p in predictions),
    )


def compare_with_truth(prediction: Prediction, *, metric: str | None) -> Answer:
    """metric: the one of the prediction's scores that decides what is right."""
    if prediction.truths and prediction.text.strip() not in prediction.truths:
        nearest = max(prediction.truths, key=lambda truth: _similarity(prediction.text, truth))
        words = compare_words(prediction.text, nearest)
    else:
        words = ((prediction.text, True),) if prediction.text else ()
    return Answer(words=words, verdict=_verdict(prediction, metric=metric), scores=dict(prediction.scores))


def _similarity(text: str, truth: str) -> float:
    return sum(same for _, same in compare_words(text, truth))


def _verdict(prediction: Prediction, *, metric: str | None) -> str:
    score = prediction.scores.get(metric) if metric else None
    if score is None:
        if not prediction.truths:
            return "unknown"
        score = float(prediction.text.strip() in [truth.strip() for truth in prediction.truths])
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"


def _thumbnail(name: str, *, run: Run) -> tuple[str | None, str]:
    """The image as the model sees it, square, as a data URI; or None and why not."""
    if raster_data_uri(name):
        return name, ""
    return find_thumbnail(name, folders=(_data_folder(run), run.workdir))


def _data_folder(run: Run) -> Path:
    """Where the validation images lie on this host; those of a bucket are where `pgdist.hub` keeps what it fetched."""
    name = str(run.setting("data.validation", ""))
    if name.startswith("gs://"):
        bucket, _, path = name.removeprefix("gs://").partition("/")
        return cache.of_object(bucket, path).parent
    return Path(name).parent
