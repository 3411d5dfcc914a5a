"""The page: whole, alone, escaped, and there whatever the workdir lacks."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pgdist.report import write_report

FILES = (
    "config.json",
    "env.json",
    "metrics.jsonl",
    "parameters.json",
    "examples.jsonl",
    "predictions",
    "bad_records.jsonl",
)
VOID = {"meta", "link", "img", "br", "wbr", "input", "hr"}
INJECTION = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&lt;"


class Page(HTMLParser):
    """The text, the elements and the addresses of a page; raises if its tags do not nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.texts: list[str] = []
        self.tags: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
                self.addresses.append(value)
            if name == "class":
                self.classes.update(value.split())
            if name.startswith("on"):
                self.handlers.append(name)
        if tag == "br":
            self.texts.append(" ")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> in {self._open} at {self.getpos()}"
        self._open.pop()
        if tag not in ("span", "b", "i", "a", "mark"):
            self.texts.append(" ")

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def notes(self) -> int:
        return self.classes["note"]


def test_the_page_tells_the_run(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path)
    for told in (
        "tiny, from tiny.npz",
        "64 of 64",
        "exact match 0 → 0.875",
        "validation loss 2.75 → 0.2794",
        "12.3 k of 197.4 k parameters",
        "Learning rate",
        "step 32 exact_match 0.219",
        "4 of 4 validation examples, 5 of 5 evaluations",
        "a green triangle left of a yellow circle",
        "<pad> × 20",
        "training steps",
        "goodput: training steps of all",
        "model FLOPs utilisation, MFU (median) 58.3 %",
        "memory of a device (most) 12.5 GiB",
        "images/a.png: the file is empty",
        "llm/layers/attn/q_einsum/w",
        "12,288 6.2 % 48.0 KiB",
        "optimizer.learning_rate 0.03",
        "jax.version",
    ):
        assert told in page.text, told
    assert page.notes == 0
    assert page.tags["svg"] == 7
    assert page.classes["right"] == 6 and page.classes["wrong"] == 14  # of 4 examples at 5 steps


def test_the_page_is_one_file_that_asks_nobody_for_anything(workdir):
    page = Page(write_report(workdir))
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,", "data:,"))]
    assert outside == []
    # 3 examples and 4 predictions.
    assert sum(a.startswith("data:image/") for a in page.addresses) == 7
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert "default-src 'none'" in page.source


def test_equal_files_give_an_equal_page_and_nothing_else_is_left_behind(workdir):
    before = {path.name for path in workdir.iterdir()}
    first = write_report(workdir).read_bytes()
    assert write_report(workdir).read_bytes() == first
    assert {path.name for path in workdir.iterdir()} == before | {"report.html"}


def test_a_page_that_cannot_be_finished_leaves_the_old_one(workdir, monkeypatch):
    before = write_report(workdir).read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pgdist.report.render.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(workdir)
    assert (workdir / "report.html").read_bytes() == before
    assert not list(workdir.glob("*.tmp"))


def inject(value):
    """Every string of a JSON value with the injection behind it, keys that are not of our format included."""
    if isinstance(value, str):
        return value if value.startswith("data:") else value + INJECTION
    if isinstance(value, list):
        return [inject(item) for item in value]
    if isinstance(value, dict):
        changed = {key: inject(item) for key, item in value.items()}
        for key, item in value.items():
            if isinstance(item, float) and key not in ("lr_scale",):
                changed[key + INJECTION] = item
        return changed
    return value


def test_no_text_of_strangers_becomes_markup(workdir):
    hostile = workdir.with_name("run<b>&amp;")
    shutil.move(workdir, hostile)
    for path in [*hostile.rglob("*.json"), *hostile.rglob("*.jsonl")]:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("".join(json.dumps(inject(json.loads(line))) + "\n" for line in lines))
    page = Page(write_report(hostile))
    assert page.tags["script"] == 1
    # One in each token and each caption of a chart; five tokens are the legend's, and have none.
    assert page.tags["b"] == page.classes["token"] - 5 + page.tags["figcaption"]
    assert page.tags["img"] == 3  # the examples'; an image of that name is on no disk
    assert page.handlers == []
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert page.text.count("<script>alert(1)</script>") > 100
    assert "{{ 7 * 7 }}" in page.text and "&lt;" in page.text


def test_an_image_that_lies_elsewhere_is_not_shown(workdir):
    rows = [json.loads(line) for line in (workdir / "examples.jsonl").read_text().splitlines()]
    rows[0]["image"] = "http://example.com/a.png"
    rows[1]["image"] = "data:image/svg+xml;base64,PHN2Zz4="
    rows[2]["image"] = 'data:image/png;base64,AAAA" onload="alert(1)'
    (workdir / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(workdir))
    assert page.text.count("no image in examples.jsonl") == 3
    assert sum(a.startswith("data:image/") for a in page.addresses) == 4
    assert "example.com" not in page.source


def test_location_tokens_are_shown_as_they_are(workdir):
    assert "<loc0123>" in Page(write_report(workdir)).text


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_costs_its_own_section_alone(workdir, missing):
    path = workdir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(workdir))
    if missing == "bad_records.jsonl":
        assert "No record was reported as bad." in page.text
    elif missing == "predictions":
        assert "There are no predictions in this workdir." in page.text
    else:
        assert f"There is no {missing} in this workdir." in page.text
    if missing != "metrics.jsonl":
        assert "exact match 0 → 0.875" in page.text
    if missing != "parameters.json":
        assert "12,288 6.2 % 48.0 KiB" in page.text


def test_an_empty_workdir_has_a_page(tmp_path):
    page = Page(write_report(tmp_path))
    assert "Nothing has been measured yet." in page.text
    assert page.text.count("in this workdir.") == 6


DAMAGED = {
    "nothing": b"",
    "null": b"null\n",
    "list": b"[]\n",
    "list of the wrong": b'[1, "a", {}, [null]]\n',
    "object of the wrong": b'{"step": "x", "model": 1, "eval": [], "pieces": 3, "index": {}, "score": 1,'
    b' "suffix": [[]]}\n',
    "text": b'"<b>"\n',
    "half": b'{"step": 3, "train/lo',
    "binary": b"\xff\xfe\x00\n\x80",
    "deep": b"[" * 100_000 + b"\n",
    "huge numbers": b'{"step": 1, "time": 1e308, "train/loss": 1e999, "validation/x": -1e308,'
    b' "train/grad_norm": 1e-320}\n'
    b'{"step": 2, "time": -1e308, "validation/x": 1e308, "train/grad_norm": 0}\n{"step": 1'
    + b"0" * 300
    + b"}\n",
    "half a character": b'{"step": 1, "prediction": "\\ud800", "suffix": "\\udfff", "reason": "\\ud800",'
    b' "image": "\\ud800\\u0000"}\n',
    "wrong parameters": b'[{"name": 1, "shape": [-1, 1e9], "dtype": null, "trainable": 1, "bytes": 1e999}]',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_no_content_of_the_files_stops_the_report(workdir, content):
    for path in [*workdir.rglob("*.json"), *workdir.rglob("*.jsonl")]:
        path.write_bytes(content)
    Page(write_report(workdir))


def test_directories_in_the_place_of_files_do_not_stop_the_report(workdir):
    for path in [*workdir.rglob("*.json"), *workdir.rglob("*.jsonl")]:
        path.unlink()
        path.mkdir()
    assert "could not be read" in Page(write_report(workdir)).text


def test_a_torn_last_line_is_ignored_and_an_unreadable_one_inside_is_told(workdir):
    path = workdir / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 65, "train/lo')
    assert Page(write_report(workdir)).notes == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "oops\n", *lines[4:]]))
    page = Page(write_report(workdir))
    assert "metrics.jsonl: 1 unreadable lines were left out, the first is line 5." in page.text
    assert page.tags["svg"] == 7


def test_a_run_cut_short_and_a_loss_that_is_not_finite_are_said_first(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["step"] <= 40]
    rows[-1]["train/loss"] = "NaN"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(workdir))
    assert "The metrics end at step 40 of 64" in page.text
    assert "not a finite number in 1 of 40 logged steps" in page.text
    assert page.classes["nonfinite"] == 1
    assert "training loss 2.274 → NaN" in page.text
