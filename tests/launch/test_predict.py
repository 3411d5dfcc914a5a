"""`launch.predict`: what it prints and writes, and that a run which stopped is gone on with."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgdist import weights
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.launch import wrong_inputs as wrong
from tests.launch.command_server import CommandServer, Finished
from tests.models.small import random_parameters

SAMPLE = "--workdir=run --data=train.jsonl --out=out.jsonl --sampler=sample --seed=3 --max_new_tokens=4"
IMAGES = "--workdir=run --prompt='caption en'"

Predict = Callable[[str], Finished]


@pytest.fixture(scope="module")
def predict_in():
    server = CommandServer()
    yield lambda folder, arguments: server.run(
        "launch.predict", shlex.split(arguments), folder=folder, streams=folder.parent
    )
    server.close()


@pytest.fixture(scope="module")
def sound_inputs(tmp_path_factory) -> Path:
    """As for wrong inputs, but answers to images differ."""
    folder = tmp_path_factory.mktemp("sound")
    wrong.write_inputs(folder)
    weights.save(folder / "run" / "model.npz", flatten(random_parameters(PRESETS["tiny"], seed=0)))
    return folder


@pytest.fixture
def inputs(sound_inputs, tmp_path) -> Path:
    return Path(shutil.copytree(sound_inputs, tmp_path / "inputs"))


@pytest.fixture
def predict(predict_in, inputs) -> Predict:
    """Runs the command in the folder of inputs; it must end well."""

    def run(arguments: str) -> Finished:
        done = predict_in(inputs, arguments)
        assert done.code == 0, done.err
        return done

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """What SAMPLE writes, and prints, from beginning to end."""

    out: bytes
    job: bytes
    answers: list[str]

    def lines(self, count: int) -> bytes:
        return b"".join(self.out.splitlines(keepends=True)[:count])


@pytest.fixture(scope="module")
def whole(predict_in, sound_inputs, tmp_path_factory) -> Whole:
    folder = Path(shutil.copytree(sound_inputs, tmp_path_factory.mktemp("whole") / "inputs"))
    done = predict_in(folder, SAMPLE)
    assert done.code == 0, done.err
    answers = done.out.splitlines()
    assert len(set(answers)) > 4  # or a test could take one for another
    job = (folder / "out.jsonl.job.json").read_bytes()
    return Whole(out=(folder / "out.jsonl").read_bytes(), job=job, answers=answers)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leave(inputs: Path, whole: Whole, out: bytes) -> Path:
    """The files of a run of SAMPLE that stopped with this in the first."""
    (inputs / "out.jsonl").write_bytes(out)
    (inputs / "out.jsonl.job.json").write_bytes(whole.job)
    return inputs / "out.jsonl"


@pytest.mark.parametrize(("rows", "cut"), [(0, 1), (1, 0), (4, 20), (7, 90)])
def test_a_run_that_stopped_goes_on_and_prints_what_is_new(inputs, predict, whole, rows, cut):
    out = leave(inputs, whole, whole.out[: len(whole.lines(rows)) + cut])
    done = predict(SAMPLE)
    assert out.read_bytes() == whole.out
    assert done.out.splitlines() == whole.answers[rows:]
    assert (f"goes on after {rows} of 8 rows" in done.err) == (rows > 0)


def test_a_run_killed_before_its_first_answer_begins_again(inputs, predict, whole):
    (inputs / "out.jsonl").touch()
    predict(SAMPLE)
    assert (inputs / "out.jsonl").read_bytes() == whole.out


def test_another_batch_size_and_more_devices_go_on_with_the_same_answers(inputs, predict, whole):
    out = leave(inputs, whole, whole.lines(3))
    done = predict(SAMPLE + " --batch_size=3 --fake_devices=2")
    assert out.read_bytes() == whole.out
    assert done.out.splitlines() == whole.answers[3:]


def test_a_finished_job_says_so_and_does_nothing(inputs, predict, whole):
    out = leave(inputs, whole, whole.out)
    before = out.stat().st_mtime_ns
    done = predict(SAMPLE)
    assert done.out == ""
    assert "--out=out.jsonl: all 8 rows are there; nothing is left to do." in done.err
    assert out.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (SAMPLE.replace("--seed=3", "--seed=4"), "  --seed: 3 -> 4\n"),
        (SAMPLE + " --n=2", "  --n: 1 -> 2\n"),
        (SAMPLE + " --prompt=x", "  --prompt: None -> 'x'\n"),
        (SAMPLE + " --allow='<loc*>'", "  --allow: [] -> ['<loc*>']\n"),
        (SAMPLE + " --weights=weights.npz", "  weights: 'sha256 "),
        (SAMPLE.replace("--data=train.jsonl", "--prompt=x --images 0.png"), "  inputs: '8 examples, sha256 "),
    ],
    ids=["seed", "n", "prompt", "allow", "weights", "inputs"],
)
def test_the_file_of_another_job_is_refused_and_stays(predict_in, inputs, whole, changed, told):
    out = leave(inputs, whole, whole.out[:200])
    done = predict_in(inputs, changed)
    assert (done.code, done.out) == (2, "")
    assert "pgdist: error: --out=out.jsonl: holds the answers of another job (there -> here):\n" in done.err
    assert told in done.err
    assert "name another file, or delete it" in done.err
    assert out.read_bytes() == whole.out[:200]


def test_a_file_that_was_edited_is_refused_and_stays(predict_in, inputs, whole):
    without_third = whole.out.replace(whole.out.splitlines(keepends=True)[2], b"")
    out = leave(inputs, whole, without_third)
    done = predict_in(inputs, SAMPLE)
    assert done.code == 2
    assert "line 3 is not the answer to input 2: the file was edited, or damaged" in done.err
    assert out.read_bytes() == without_third


def test_inputs_that_could_not_be_read_count_as_done(predict_in, inputs):
    wrong.line(3, wrong.example(image="no.png"))(inputs)
    first = predict_in(inputs, SAMPLE)
    whole = (inputs / "out.jsonl").read_bytes()
    (inputs / "out.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    rest, nothing = predict_in(inputs, SAMPLE), predict_in(inputs, SAMPLE)
    assert (inputs / "out.jsonl").read_bytes() == whole
    assert [first.code, rest.code, nothing.code] == [3, 3, 3]
    for done in (first, rest, nothing):
        assert "1 input(s) could not be read and have no answer:\n" in done.err
        assert "train.jsonl, line 3: image 'no.png': no such file" in done.err
    assert first.out.splitlines()[5:] == rest.out.splitlines() and nothing.out == ""


def test_a_folder_stands_for_its_images_sorted_by_name(inputs, predict):
    (inputs / "album" / "b").mkdir(parents=True)
    for name in ("c.PNG", "a.png", "b/z.png", ".hidden.png"):
        shutil.copy(inputs / "0.png", inputs / "album" / name)
    (inputs / "album" / "notes.txt").write_text("no image")
    done = predict(IMAGES + " --out=out.jsonl --images 1.png album")
    rows = read_rows(inputs / "out.jsonl")
    assert [row["image"] for row in rows] == ["1.png", "album/a.png", "album/b/z.png", "album/c.PNG"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prediction"].replace("\n", "\\n") for row in rows] == done.out.splitlines()


@pytest.mark.parametrize("sampler", ["beam", "sample --candidates=4"])
def test_several_answers_stand_in_the_order_of_their_log_probabilities(inputs, predict, sampler):
    done = predict(
        IMAGES
        + f" --sampler={sampler} --n=2 --logprobs --length_penalty=1 --out=o.jsonl --images 0.png 1.png"
    )
    rows = read_rows(inputs / "o.jsonl")
    for row in rows:
        assert len(row["predictions"]) == 2 and row["predictions"][0] == row["prediction"]
        assert row["logprob"] == [pytest.approx(sum(tokens)) for tokens in row["token_logprobs"]]
        if sampler != "beam":
            assert row["logprob"] == sorted(row["logprob"], reverse=True)
    texts = [text.replace("\n", "\\n") for row in rows for text in row["predictions"]]
    assert done.out.splitlines() == texts


def test_the_log_probability_of_one_answer_is_a_number(inputs, predict):
    predict(IMAGES + " --logprobs --out=out.jsonl --images 0.png")
    (row,) = read_rows(inputs / "out.jsonl")
    assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]))
    assert "predictions" not in row


def test_only_allowed_tokens_are_written_and_banned_ones_are_not(predict):
    located = predict(IMAGES + " --sampler=sample --max_new_tokens=6 --allow='<loc*>' --images 0.png 1.png")
    answers = located.out.replace("\n", "")
    assert answers and answers.replace("<loc", ">").strip(">0123456789") == ""
    few = predict(
        IMAGES + " --sampler=sample --max_new_tokens=6 --allow='<loc*>' --ban='<loc0*>' --images 0.png 1.png"
    )
    assert "<loc1" in few.out and "<loc0" not in few.out


def test_the_likeliest_choice_is_the_answer(inputs, predict):
    done = predict(IMAGES + " --choices='a red circle,a blue square' --logprobs --out=o.jsonl --images 0.png")
    (row,) = read_rows(inputs / "o.jsonl")
    assert sorted(row["predictions"]) == ["a blue square", "a red circle"]
    assert row["logprob"] == sorted(row["logprob"], reverse=True)
    assert done.out == row["prediction"] + "\n" == row["predictions"][0] + "\n"


def test_each_line_may_have_choices_of_its_own(inputs, predict):
    lines = [
        wrong.example(image=f"{i}.png", choices=[f"{i}", "a circle", *["square"] * (i % 2)]) for i in range(3)
    ]
    (inputs / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    predict("--workdir=run --data=train.jsonl --choices_field=choices --out=o.jsonl")
    for i, row in enumerate(read_rows(inputs / "o.jsonl")):
        assert sorted(row["predictions"]) == sorted(row["choices"])
        assert row["score"] == 0.0 and str(i) in row["predictions"]


def test_a_report_shows_all_rows_of_a_run_that_was_gone_on_with(inputs, predict, whole):
    leave(inputs, whole, whole.lines(3))
    predict(SAMPLE + " --report=page.html")
    page = (inputs / "page.html").read_text()
    assert page.count('src="data:image/') == 8
    (inputs / "page.html").unlink()
    predict(SAMPLE + " --report=page.html")  # all rows are there
    assert (inputs / "page.html").read_text() == page


def test_answers_may_go_to_what_is_no_file(inputs, predict):
    done = predict(IMAGES + " --out=/dev/null --images 0.png")
    assert done.out
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.job.json").exists()
