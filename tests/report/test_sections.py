"""The parts of the report: what they choose to show, and how they count."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pgdist.report import formats
from pgdist.report.charts import MOST_POINTS, Line, line_chart
from pgdist.report.data import Evaluation, Example, Metrics, load_run
from pgdist.report.predictions import build_grid, choose_evaluations, compare_words
from pgdist.report.timing import describe_timing, run_seconds, summarize_timing
from pgdist.report.tokens import describe_tokens


def test_a_step_written_twice_counts_as_it_was_written_last(tmp_path):
    rows = [
        {"step": 2, "train/loss": 5.0},
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": "Infinity"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(tmp_path).metrics.points("train/loss") == ((1, 2.0), (2, math.inf))


@pytest.mark.parametrize(
    ("count", "steps"), [(0, []), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5]), (11, [0, 2, 4, 6, 8, 10])]
)
def test_of_many_evaluations_the_first_the_last_and_even_ones_between_are_shown(count, steps):
    evaluations = [Evaluation(step=step, predictions=()) for step in range(count)]
    assert [evaluation.step for evaluation in choose_evaluations(evaluations)] == steps


def write_predictions(workdir, step, rows):
    path = workdir / "predictions" / f"step_{step:06}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_examples_of_all_evaluations_come_before_those_of_one(tmp_path):
    write_predictions(tmp_path, 0, [{"index": i, "prediction": "a"} for i in range(100)])
    write_predictions(tmp_path, 16, [{"index": i, "prediction": "b"} for i in (70, 3)])
    grid = build_grid(load_run(tmp_path), metric=None)
    assert [row.index for row in grid.rows[:3]] == [3, 70, 0]
    assert len(grid.rows) == 16 and grid.total_examples == 100
    assert grid.rows[2].answers[1] is None


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"suffix": "two cats", "prediction": " two cats\n"}, "right"),
        ({"suffix": "two cats", "prediction": "Two cats"}, "wrong"),
        ({"suffix": ["2", "two"], "prediction": "two"}, "right"),
        ({"suffix": None, "prediction": "two"}, "unknown"),
        ({"suffix": "a", "prediction": "b", "score": {"iou": 0.7}}, "partly"),
        ({"suffix": "a", "prediction": "b", "score": {"iou": 1.0}}, "right"),
        ({"suffix": "a", "prediction": "a", "score": {"iou": 0.0}}, "wrong"),
        ({"suffix": "a", "prediction": "a", "score": {"other": 0.0}}, "right"),
    ],
)
def test_a_prediction_is_judged_by_its_score_or_else_by_the_truth(tmp_path, row, verdict):
    write_predictions(tmp_path, 1, [row])
    (shown,) = build_grid(load_run(tmp_path), metric="iou").rows
    assert shown.answers[0].verdict == verdict


def test_words_that_differ_from_the_truth_are_marked():
    assert compare_words("a red dog", "a big red cat") == (
        ("a", True), (" ", True), ("red", True), (" ", True), ("dog", False),
    )  # fmt: skip
    assert compare_words("<loc0001><loc0002>x", "<loc0001><loc0003>x") == (
        ("<loc0001>", True), ("<loc0002>", False), ("x", True),
    )  # fmt: skip


@given(st.text(alphabet="ab <>loc019\n", max_size=60), st.text(alphabet="ab <>loc019\n", max_size=60))
def test_marking_words_loses_no_character(text, truth):
    assert "".join(word for word, _ in compare_words(text, truth)) == text


def test_a_thumbnail_is_the_image_beside_the_data_and_no_larger_than_the_file(workdir):
    data = workdir.parent / "data"
    Image.effect_noise((500, 300), 90).convert("RGB").save(data / "images" / "scene_001.png")
    (data / "images" / "scene_002.png").write_bytes(b"")
    (data / "images" / "scene_003.png").unlink()
    rows = build_grid(load_run(workdir), metric="exact_match").rows
    kinds = [row.image.split(";")[0] if row.image else row.image_problem for row in rows]
    assert kinds == ["data:image/png", "data:image/jpeg", "the file is empty", "no such file"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(row.image.split(",")[1]))).size for row in rows[:2]]
    assert sizes == [(56, 56), (224, 224)]


def test_a_thumbnail_of_data_in_a_bucket_is_of_the_copy_that_was_fetched(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("PGDIST_CACHE", str(tmp_path / "cache"))
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["validation"] = "gs://cows/v1/validation.jsonl"
    (workdir / "config.json").write_text(json.dumps(config))
    assert {row.image for row in build_grid(load_run(workdir), metric=None).rows} == {None}
    shutil.copytree(workdir.parent / "data", tmp_path / "cache/gs/cows/v1")
    assert all(row.image for row in build_grid(load_run(workdir), metric=None).rows)


def test_tokens_say_their_part_and_padding_is_told_once():
    example = Example(
        image=None,
        prefix="p",
        suffix="s",
        pieces=("<bos>", "\n", "s", "<eos>", "t", "<pad>", "<pad>", "<pad>", ""),
        mask_ar=(0, 0, 1, 1, 1, 0, 0, 0, 0),
        mask_loss=(0, 0, 1, 1, 0, 0, 0, 0, 1),
        mask_input=(1, 1, 1, 1, 1, 0, 0, 0, 0),
    )
    told = [(token.text, token.part, token.first, token.count) for token in describe_tokens(example)]
    assert told == [
        ("<bos>", "prefix", 0, 1),
        ("⏎", "prefix", 1, 1),
        ("s", "loss", 2, 1),
        ("<eos>", "loss", 3, 1),
        ("t", "suffix", 4, 1),
        ("<pad>", "padding", 5, 3),
        ("∅", "loss", 8, 1),  # scored padding is a bug, and shown
    ]


def test_shares_of_time_sum_to_all_of_it(workdir):
    metrics = Metrics(
        series={
            "time/step_seconds": ((1, 6.0), (2, 1.0), (3, math.nan)),
            "time/data_wait_seconds": ((2, 1.0),),
            "train/examples_per_second": ((1, 1.0), (2, 8.0), (3, 10.0)),
        },
        times=((1, 100.0), (2, 104.0), (3, 110.0)),
    )
    timing = summarize_timing(metrics)
    assert {share.name: share.seconds for share in timing.shares} == {
        "training steps": 7.0,
        "waiting for data": 1.0,
        "other": 8.0,
    }
    # 10 seconds between the lines, and 6 of the first step before its line.
    assert timing.total == 16.0 and timing.goodput == 7 / 16
    assert sum(share.share for share in timing.shares) == pytest.approx(1)
    assert timing.examples_per_second == 8.0 and timing.tokens_per_second is None
    assert run_seconds(metrics) == 16.0
    assert run_seconds(load_run(workdir).metrics) > 6


def test_the_log_gets_the_shares_largest_first_and_what_is_known_of_the_devices(workdir):
    line = describe_timing(load_run(workdir))
    assert re.fullmatch(
        r"Time: .*: training steps [\d.]+ %, evaluation [\d.]+ %, .*\. MFU 58\.3 % in the median step\. "
        r"Memory of a device: 12\.5 GiB at most\.",
        line,
    )


def test_what_no_device_told_is_left_out(tmp_path):
    assert describe_timing(load_run(tmp_path)) == "Time: nothing was measured."
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "time/step_seconds": 2.0}\n')
    assert describe_timing(load_run(tmp_path)) == "Time: 2.0 s: training steps 100.0 %."


def test_a_chart_of_a_long_run_is_small_and_keeps_its_extremes():
    points = tuple((step, 1.0 + (step == 70_000) * 2.5) for step in range(100_000))
    chart = line_chart([Line(name="loss", points=points, color=1)], title="Loss")
    assert len(chart) < 40_000 and MOST_POINTS < 1000
    assert 'class="band c1"' in chart and ">4</text>" in chart and ">80k</text>" in chart
    assert f",{196 - 186 * 3.5 / 4:.1f} " in chart


def test_a_chart_over_decades_has_a_logarithmic_axis():
    points = tuple((step, 10.0**-step) for step in range(6))
    chart = line_chart([Line(name="", points=points, color=1)], title="Loss")
    assert [f">{tick}<" in chart for tick in ("1", "0.1", "0.01", "0.001", "0.0001", "1e-5")] == [True] * 6


@given(
    st.lists(
        st.tuples(st.integers(0, 2**53), st.floats() | st.floats(0, 1) | st.sampled_from([0.0, 1.0])),
        min_size=1,
    )
)
def test_any_values_can_be_drawn(points):
    chart = line_chart([Line(name="<", points=tuple(sorted(points)), color=1)], title="&")
    assert "nan" not in chart and "inf" not in chart
    assert "<b>&amp;</b>" in chart or chart == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.number(None), "–"),
        (formats.number(0.0123456), "0.01235"),
        (formats.number(1234567.8), "1,234,568"),
        (formats.number(math.nan), "NaN"),
        (formats.number(-math.inf), "−∞"),
        (formats.number(1e300), "1e+300"),
        (formats.count(9999), "9,999"),
        (formats.count(12_288), "12.3 k"),
        (formats.count(169_869_312), "169.9 M"),
        (formats.count(2_923_335_408), "2.923 B"),
        (formats.size(512), "512 B"),
        (formats.size(6 * 2**30), "6.0 GiB"),
        (formats.size(3 * 2**50), "3072.0 TiB"),
        (formats.duration(None), "–"),
        (formats.duration(0.456), "0.46 s"),
        (formats.duration(59.97), "1 min 00 s"),
        (formats.duration(192), "3 min 12 s"),
        (formats.duration(18_120), "5 h 02 min"),
        (formats.moment(0), "1970-01-01 00:00 UTC"),
        (formats.moment(1e300), "–"),
        (formats.percent(0.0582), "5.8 %"),
        (formats.breakable("a/b<c"), "a/<wbr>b&lt;c"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected
