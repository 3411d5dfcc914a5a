"""Scores of one answer against its references, by the names that `config.eval.metric` takes.

A metric is a plain function of the predicted text and one reference or several, and gives a float, 0 to 1.
Where there are several references, the best one counts. Whatever the model wrote, a metric scores it and
never raises.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pgdist.data.locations import find_boxes
from pgdist.errors import ConfigError

Metric = Callable[[str, str | Sequence[str]], float]


def metric(name: str) -> Metric:
    """The metric of that name; ConfigError naming the nearest one when there is none."""
    if name in METRICS:
        return METRICS[name]
    nearest = difflib.get_close_matches(name.lower(), METRICS, n=1, cutoff=0.0)[0]
    known = ", ".join(METRICS)
    raise ConfigError(
        f"config.eval.metric={name!r} is no metric; did you mean {nearest!r}? There are: {known}."
    )


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1 if the prediction is one of the references but for white space around it; case counts."""
    return float(prediction.strip() in [reference.strip() for reference in _as_list(references)])


def detection_iou(prediction: str, references: str | Sequence[str]) -> float:
    """Intersection over union of the boxes written as four tokens `<loc....>`: y0 x0 y1 x1, each v * 1023.

    Only boxes are compared: the labels behind them are ignored. Several boxes in a text are paired one to one
    so that the sum of IoUs is the largest, which is divided by the larger number of boxes: a missing or an
    extra box counts 0. A text without a valid box (y0 < y1 <= 1023, x0 < x1 <= 1023) scores 0; so does a
    reference without one.
    """
    boxes = _boxes(prediction)
    return max((_mean_iou(boxes, _boxes(reference)) for reference in _as_list(references)), default=0.0)


def anls(prediction: str, references: str | Sequence[str]) -> float:
    """Normalised Levenshtein similarity, as in arXiv 1907.00490, equation 1 (ANLS is its mean over examples).

    1 - distance / length of the longer text; 0 when that is 0.5 or less. Case and white space at the ends do
    not count.
    """
    prediction = prediction.strip().lower()
    return max(
        (_anls(prediction, reference.strip().lower()) for reference in _as_list(references)), default=0.0
    )


def relaxed_accuracy(prediction: str, references: str | Sequence[str]) -> float:
    """1 if equal, or if both are numbers at most 5 % of the reference apart (arXiv 2203.10244, section 5.1).

    `12%` is the number 0.12. Case and white space at the ends do not count; a reference of 0 has to be met as
    it is written.
    """
    prediction = prediction.strip().lower()
    return float(any(_relaxed_match(prediction, r.strip().lower()) for r in _as_list(references)))


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "detection_iou": detection_iou,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def _as_list(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def _boxes(text: str) -> np.ndarray:
    """The valid boxes written in the text, float64[n, 4] as y0 x0 y1 x1, shares of the image; n may be 0."""
    return np.array([(box.y0, box.x0, box.y1, box.x1) for box in find_boxes(text)], np.float64).reshape(-1, 4)


def _mean_iou(boxes: np.ndarray, references: np.ndarray) -> float:
    if not len(boxes) or not len(references):
        return 0.0
    iou = _pairwise_iou(boxes, references)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / max(iou.shape))


def _pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Boxes float64[n, 4], float64[m, 4] of positive area -> float64[n, m]."""
    start = np.maximum(a[:, None, :2], b[None, :, :2])
    stop = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.maximum(stop - start, 0.0), axis=-1)
    area_a, area_b = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b))
    return intersection / (area_a[:, None] + area_b[None, :] - intersection)


def _anls(prediction: str, reference: str) -> float:
    longest = max(len(prediction), len(reference))
    if not longest:
        return 1.0
    distance = _levenshtein(prediction, reference) / longest
    return 1.0 - distance if distance < 0.5 else 0.0


def _levenshtein(a: str, b: str) -> int:
    """The smallest number of insertions, deletions and replacements that make b of a."""
    previous = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        current = [i]
        for j, char_b in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (char_a != char_b)))
        previous = current
    return previous[-1]


def _relaxed_match(prediction: str, reference: str) -> bool:
    if prediction == reference:
        return True
    number, target = _as_number(prediction), _as_number(reference)
    if number is None or not target:
        return False
    return abs(number - target) / abs(target) <= 0.05


def _as_number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
