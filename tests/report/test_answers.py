"""The report of a prediction: every input with its answer, boxes where they are meant, and nothing run or fetched."""

from __future__ import annotations

import json

import pytest

from pgdist.report import read_rows, write_predictions_report
from pgdist.report.answers import MOST_BOXES, MOST_CHARACTERS, MOST_INPUTS, MOST_OTHERS
from tests.report.conftest import draw_scene, write_lines
from tests.report.test_report import INJECTION, Page

BOX = "<loc0102><loc0051><loc0614><loc0818>"
ROWS = [
    {
        "index": 0,
        "image": "images/scene_0.png",
        "prefix": "detect circle ; square",
        "suffix": f"{BOX} circle",
        "prediction": f"{BOX} circle ; <loc0000><loc0512><loc1023><loc1023> square",
        "score": 0.5,
        "logprob": -1.25,
    },
    {
        "index": 1,
        "image": "images/scene_1.png",
        "prefix": "caption en",
        "suffix": None,
        "prediction": "a red circle",
        "predictions": ["a red circle", "a circle", "circles"],
        "logprob": [-0.5, -1.5, -2.5],
        "token_logprobs": [[-0.25, -0.25], [-1.5], [-2.5]],
    },
    {"index": 2, "prediction": None, "error": "data.jsonl, line 3: image 'c.png': no such file"},
]


@pytest.fixture
def data(tmp_path):
    """A folder with the images of ROWS."""
    (tmp_path / "images").mkdir()
    for index in range(2):
        draw_scene(index).save(tmp_path / "images" / f"scene_{index}.png")
    return tmp_path


def write(data, rows) -> Page:
    return Page(write_predictions_report(data / "answers.html", rows, image_root=data, title="answers.jsonl"))


def with_answer(text: str) -> dict:
    return ROWS[0] | {"prediction": text, "suffix": None}


def test_the_page_shows_each_input_with_its_answer(data):
    page = write(data, ROWS)
    for told in (
        "inputs 3 1 could not be read",
        "mean score 0.5 of 1 with a truth",
        "prompt detect circle ; square",
        f"truth {BOX} circle",
        "score 0.5 log-probability -1.25",
        "answer a red circle log-probability -0.5 others a circle -1.5 circles -2.5",
        "line 3: image 'c.png': no such file",
    ):
        assert told in page.text, told
    assert page.tags["article"] == 3 and page.tags["img"] == 2
    assert page.classes["partly"] == page.classes["unknown"] == 1


def test_boxes_lie_on_the_image_where_their_tokens_say(data):
    page = write(data, ROWS)
    assert page.tags["svg"] == 1 and page.tags["rect"] == 3  # the truth's as well
    assert page.classes["truth"] == 1
    assert page.source.count('<rect x="4.99" y="9.97" width="74.98" height="50.05">') == 2
    assert '<rect x="50.05" y="0.00" width="49.95" height="100.00">' in page.source
    # The same colour for the same label.
    assert page.classes["c1"] == 2 and page.classes["c2"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "<loc0102><loc0051><loc0614> circle",
        "<loc0102><loc0051><loc0614><loc1024> circle",  # beyond the last
        "<loc0614><loc0051><loc0102><loc0818> circle",  # the end above the start
        "<loc102><loc51><loc614><loc818> circle",
        "<loc0102> <loc0051> <loc0614> <loc0818> circle",
        "<loc0102><loc0051><loc06",
    ],
)
def test_location_tokens_that_are_no_box_stay_text(data, text):
    page = write(data, [with_answer(text)])
    assert page.tags["svg"] == 0
    assert text in page.text


def test_boxes_between_tokens_that_are_none_are_drawn_with_their_labels(data):
    page = write(data, [with_answer(f"<loc0001> {BOX}<seg001><seg002> a <b> & c ; {BOX}")])
    assert page.tags["rect"] == 2 and page.tags["b"] == 0
    assert "<title>a</title>" in page.source and "<title></title>" in page.source


def test_no_text_of_strangers_becomes_markup(data):
    rows = [
        {name: value + INJECTION if isinstance(value, str) else value for name, value in row.items()}
        | {"image": ROWS[0]["image"], "predictions": [INJECTION, INJECTION]}
        for row in ROWS
    ]
    page = Page(
        write_predictions_report(data / "answers.html", rows, image_root=data, title=f"answers{INJECTION}")
    )
    assert page.tags["script"] == 0 and page.handlers == []
    assert page.tags["img"] == 2
    assert all(address.startswith("data:") for address in page.addresses)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert "{{ 7 * 7 }}" in page.text and "&lt;" in page.text


def test_of_many_inputs_the_first_are_shown_and_all_are_counted(data):
    rows = ({**ROWS[0], "index": index, "score": 1.0} for index in range(MOST_INPUTS + 1234))
    page = write(data, rows)
    assert page.tags["article"] == MOST_INPUTS
    assert f"The first {MOST_INPUTS} are shown; 1,234 more are counted, and left out." in page.text
    assert "inputs 1,734" in page.text and "mean score 1 of 1,734" in page.text


def test_an_endless_answer_is_cut(data):
    endless = with_answer(BOX * 10_000) | {"predictions": ["x" * 10 * MOST_CHARACTERS] * 100}
    page = write(data, [endless])
    assert page.tags["rect"] <= MOST_BOXES
    assert page.text.count("x" * MOST_CHARACTERS) == MOST_OTHERS
    assert len(page.source) < 200_000


def test_no_row_can_stop_the_report(data):
    strange = [
        {},
        {"index": "seven", "image": 5, "prefix": None, "suffix": ["a", None], "prediction": {"a": 1}},
        {"image": "\0", "prediction": "\ud800", "score": "NaN", "logprob": ["x"], "predictions": "text"},
        {"image": "../" * 50, "score": float("nan"), "logprob": float("inf"), "predictions": [None, 3]},
        {"error": 7},
    ]
    assert write(data, strange).tags["article"] == len(strange)
    assert "There are no predictions." in write(data, []).text


def test_the_rows_are_read_from_the_file_that_prediction_writes_and_half_a_line_is_none(data):
    path = data / "answers.jsonl"
    write_lines(path, ROWS)
    with path.open("a") as file:
        file.write('{"index": 3, "predict')
    assert list(read_rows(path)) == json.loads(json.dumps(ROWS))


def test_a_page_that_cannot_be_finished_leaves_the_old_one(data, monkeypatch):
    before = write(data, ROWS).source

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pgdist.report.page.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write(data, [])
    assert (data / "answers.html").read_text() == before
    assert not list(data.glob("*.tmp"))
