"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgdist.errors import ConfigError
from pgdist.evaluate.metrics import METRICS, anls, detection_iou, exact_match, metric, relaxed_accuracy


def box(y0: int, x0: int, y1: int, x1: int) -> str:
    return "".join(f"<loc{value:04d}>" for value in (y0, x0, y1, x1))


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("a red circle", "a red circle", 1.0),
        (" a red circle\n", "a red circle ", 1.0),
        ("A red circle", "a red circle", 0.0),
        ("a red  circle", "a red circle", 0.0),
        ("two", ["one", "two"], 1.0),
        ("three", ["one", "two"], 0.0),
        ("", "", 1.0),
        ("a", "abc", 0.0),  # a single reference is a text, not a list of letters
        ("a", [], 0.0),
    ],
)
def test_exact_match_ignores_white_space_around_and_nothing_else(prediction, references, score):
    assert exact_match(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        (box(0, 0, 100, 100), box(0, 0, 100, 100), 1.0),
        (box(0, 0, 100, 100) + " red square", box(0, 0, 100, 100) + " blue circle", 1.0),  # boxes only
        (box(0, 0, 100, 100), box(0, 50, 100, 150), 1 / 3),
        (box(0, 0, 100, 200), box(0, 0, 100, 100), 1 / 2),
        (box(10, 20, 30, 60), box(20, 40, 40, 80), 200 / 1400),  # y and x are not the same
        (box(0, 0, 100, 100), box(0, 100, 100, 200), 0.0),  # they touch
        (box(0, 0, 1023, 1023), box(0, 0, 1023, 1023), 1.0),
        (box(0, 0, 10, 10), [box(500, 500, 600, 600), box(0, 0, 10, 20)], 1 / 2),
    ],
)
def test_detection_iou_is_the_share_of_the_union(prediction, references, score):
    assert detection_iou(prediction, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "a red square",
        "<loc0000><loc0000><loc0100>",
        "<loc0000> <loc0000> <loc0100> <loc0100>",
        "<loc0><loc0><loc100><loc100>",
        box(100, 0, 0, 100),
        box(0, 100, 100, 0),
        box(0, 0, 0, 100),
        box(0, 0, 1024, 100),
        "<loc-001><loc0000><loc0100><loc0100>",
    ],
)
def test_a_text_without_a_valid_box_scores_zero(prediction):
    assert detection_iou(prediction, box(0, 0, 100, 100)) == 0.0
    assert detection_iou(box(0, 0, 100, 100), prediction) == 0.0


def test_several_boxes_are_paired_for_the_best_sum_in_any_order():
    a, b, c = box(0, 0, 100, 100), box(200, 200, 300, 300), box(400, 400, 500, 500)
    assert detection_iou(f"{a} x ; {b} x", f"{b} x ; {a} x") == 1.0
    assert detection_iou(f"{a} x", f"{a} x ; {b} x") == pytest.approx(1 / 2)  # one is missing
    assert detection_iou(f"{a} x ; {a} x", f"{a} x") == pytest.approx(1 / 2)  # one too many
    assert detection_iou(f"{a} ; {b} ; {c}", f"{c} ; {a}") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("kitten", "kitten", 1.0),
        ("Kitten ", "kitten", 1.0),
        ("kitten", "sitting", 1 - 3 / 7),  # the textbook distance: 3
        ("abcd", "abcx", 3 / 4),
        ("abcd", "abxy", 0.0),  # a distance of 0.5 is too much
        ("", "abc", 0.0),
        ("abc", "", 0.0),
        ("", "", 1.0),
        ("abcd", ["zzzz", "abcx", "abxx"], 3 / 4),
    ],
)
def test_anls_is_the_similarity_to_the_best_reference(prediction, references, score):
    assert anls(prediction, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("100", "100", 1.0),
        ("105", "100", 1.0),
        ("106", "100", 0.0),
        ("95", "100", 1.0),
        ("94.9", "100", 0.0),
        ("-100", "100", 0.0),
        ("-104", "-100", 1.0),
        ("12%", "0.12", 1.0),
        ("12", "12%", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("0.001", "0", 0.0),
        ("Yes", "yes", 1.0),
        ("yess", "yes", 0.0),
        ("nan", "100", 0.0),
        ("inf", "100", 0.0),
        ("100", "inf", 0.0),
        ("50", ["40", "51"], 1.0),
        ("%", "%", 1.0),
        ("%", "5%", 0.0),
    ],
)
def test_relaxed_accuracy_allows_numbers_five_percent(prediction, references, score):
    assert relaxed_accuracy(prediction, references) == score


@given(prediction=st.text(max_size=60), reference=st.text(max_size=60))
def test_whatever_is_written_every_metric_scores_it_between_zero_and_one(prediction, reference):
    for name in METRICS:
        assert 0.0 <= metric(name)(prediction, reference) <= 1.0


@given(tokens=st.lists(st.integers(0, 1100), max_size=14))
def test_any_run_of_loc_tokens_has_a_score(tokens):
    text = "".join(f"<loc{token:04d}>" for token in tokens)
    assert 0.0 <= detection_iou(text, box(0, 0, 100, 100)) <= 1.0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("exact_mach", "exact_match"), ("iou", "detection_iou"), ("ANLS", "anls")],
)
def test_an_unknown_metric_names_the_nearest_one_and_all(name, nearest):
    with pytest.raises(ConfigError) as error:
        metric(name)
    assert f"{name!r} is no metric" in str(error.value)
    assert all(known in str(error.value) for known in METRICS)
    assert f"did you mean {nearest!r}" in str(error.value)
