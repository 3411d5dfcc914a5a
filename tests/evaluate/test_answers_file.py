"""The file that answers are appended to: wherever it was cut off, each row comes to be in it once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pgdist.errors import ConfigError, DataError
from pgdist.evaluate.answers_file import AnswersFile, answer_row, check_path
from pgdist.evaluate.runner import Candidate, Prediction

JOB = {"inputs": "3 examples", "--seed": 0, "--allow": ("<loc*>",)}
ROWS = [
    {"index": 0, "prediction": "a cow\nand a ☂"},
    {"index": 1, "prediction": None, "error": "no such file"},
    {"index": 2, "prediction": "half a surrogate pair: \ud83d"},
]


def answers_file(path: Path, **changed: object) -> AnswersFile:
    return AnswersFile(str(path), describe=lambda: JOB | changed)


def finish(path: Path) -> bytes:
    """What is in the file when the rows that it lacks have been appended."""
    file = answers_file(path)
    progress = file.look()
    with file.open(after=progress) as append:
        for row in ROWS[progress.rows :]:
            append(row)
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path) -> bytes:
    return finish(tmp_path / "whole.jsonl")


def test_each_row_is_a_line_of_json(whole):
    assert [json.loads(line) for line in whole.splitlines()] == ROWS


def test_cut_off_at_any_byte_it_is_gone_on_with(tmp_path, whole):
    out = tmp_path / "whole.jsonl"
    for size in range(len(whole) + 1):
        out.write_bytes(whole[:size])
        assert answers_file(out).look().rows == whole[:size].count(b"\n")
        assert finish(out) == whole


def test_what_its_rows_answer_is_said_before_the_first_of_them(tmp_path):
    out = tmp_path / "out.jsonl"
    with answers_file(out).open(after=answers_file(out).look()):
        assert out.read_bytes() == b""
        assert (tmp_path / "out.jsonl.job.json").exists()


def test_looking_changes_nothing(tmp_path):
    assert answers_file(tmp_path / "out.jsonl").look().rows == 0
    assert list(tmp_path.iterdir()) == []


def test_rows_without_an_answer_are_counted_and_told(tmp_path, whole):
    failures = answers_file(tmp_path / "whole.jsonl").look().failures
    assert failures.count == 1
    with pytest.raises(DataError, match="1 input.* have no answer:\n  no such file"):
        failures.check()


def test_of_many_failures_the_first_are_told():
    many = answers_file(Path("/dev/null")).look().failures
    for i in range(12):
        many = many.add(f"reason {i}")
    with pytest.raises(DataError, match=r"(?s)^12 input.*reason 9\n  and 2 more$"):
        many.check()


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"index": 0}\n', b"\n"])
def test_a_file_that_nobody_has_described_is_refused(tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(ConfigError, match="is there already, and no out.jsonl.job.json beside it"):
        answers_file(out).look()
    assert out.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("description", ["", "{", "[]", "null", '{"mine": 1}'])
def test_a_description_that_is_none_is_refused(tmp_path, whole, description):
    (tmp_path / "whole.jsonl.job.json").write_text(description)
    with pytest.raises(ConfigError, match="is there already, and no whole.jsonl.job.json beside it says"):
        answers_file(tmp_path / "whole.jsonl").look()


def test_the_differences_to_another_job_are_told(tmp_path, whole):
    with pytest.raises(
        ConfigError, match=r"\(there -> here\):\n  --seed: 0 -> 1\n  --n: None -> 2\nIt stays"
    ):
        answers_file(tmp_path / "whole.jsonl", **{"--seed": 1, "--n": 2}).look()


def test_two_processes_do_not_write_it_at_once(tmp_path):
    out = tmp_path / "out.jsonl"
    first, second = answers_file(out), answers_file(out)
    start = second.look()
    with first.open(after=start) as append:
        with pytest.raises(ConfigError, match="another process is writing it"):
            with second.open(after=start):
                pass
        append(ROWS[0])
    with pytest.raises(ConfigError, match="another process has gone on with it"):
        with second.open(after=start):
            pass
    assert finish(out).count(b"\n") == len(ROWS)


def test_a_pipe_is_written_to():
    reading, writing = os.pipe()
    try:
        path = f"/dev/fd/{writing}"  # as of a shell's >(gzip)
        check_path(path, flag="--out", inputs=[])
        file = answers_file(Path(path))
        with file.open(after=file.look()) as append:
            append(ROWS[0])
        assert json.loads(os.read(reading, 1000)) == ROWS[0]
    finally:
        os.close(reading)
        os.close(writing)


def test_a_full_disk_is_told():
    file = answers_file(Path("/dev/full"))
    with pytest.raises(ConfigError, match="--out=/dev/full: cannot be written: No space left on device"):
        with file.open(after=file.look()) as append:
            append(ROWS[0])


def test_a_field_of_the_inputs_own_is_never_taken_for_one_of_the_row(tmp_path):
    one = Candidate(text="a cow", logprob=-1.0, token_logprobs=[-0.5, -0.5])
    found = Prediction(
        index=0,
        prediction="a cow",
        candidates=(one,),
        extra={"prediction": "x", "logprob": 3, "score": 5, "error": "of the scanner", "page": 7},
    )
    row = answer_row(found, several=False, logprobs=True)
    assert (row["prediction"], row["logprob"], row["page"]) == ("a cow", -1.0, 7)
    assert not {"score", "error"} & row.keys()  # a report would show a failure, and count the score

    file = answers_file(tmp_path / "out.jsonl")
    with file.open(after=file.look()) as append:
        append(row)
    assert file.look().failures.count == 0


def test_what_json_cannot_say_is_null():
    nan = float("nan")
    one = Candidate(text="", logprob=nan, token_logprobs=[nan, -0.5])
    row = answer_row(Prediction(index=0, candidates=(one,)), several=False, logprobs=True)
    assert (row["logprob"], row["token_logprobs"]) == (None, [None, -0.5])
