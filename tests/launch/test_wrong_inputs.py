"""Wrong inputs to the commands: what is said, the exit code, and that nothing which was there is lost.

Each case is a command line as a user would type it, in a folder of inputs that are sound but for what the
case spoils. A case that ends before anything is trained or answered must leave the folder exactly as it was.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import wrong_inputs as wrong
from tests.launch.command_server import CommandServer, Finished, environment
from tests.launch.wrong_input_cases import CASES, TRAIN
from tests.launch.wrong_inputs import Case
from tests.launch.wrong_predict_cases import ASK, ASK_DATA

Run = Callable[[str], Finished]


@pytest.fixture(scope="module")
def server():
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sound_inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    wrong.write_inputs(folder)
    return folder


@pytest.fixture
def inputs(sound_inputs, tmp_path) -> Path:
    """A folder of sound inputs, for one test to spoil."""
    return Path(shutil.copytree(sound_inputs, tmp_path / "inputs"))


@pytest.fixture
def run(server, inputs, tmp_path) -> Run:
    """Runs a command line, such as "train --config=config.py", in the folder of inputs."""
    return lambda command: _run(server, command, folder=inputs, streams=tmp_path)


def _run(server: CommandServer, command: str, *, folder: Path, streams: Path) -> Finished:
    name, *arguments = shlex.split(command)
    return server.run(f"launch.{name}", arguments, folder=folder, streams=streams)


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its content, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def _check(case: Case, done: Finished) -> None:
    assert "Traceback" not in done.err
    assert done.err.count("pgdist: error: ") == 1
    message = done.err[done.err.index("pgdist: error: ") :]
    assert re.search(case.message, message, re.DOTALL | re.MULTILINE), message
    assert (done.code, done.out) == (case.code, "")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_wrong_input_is_told_and_nothing_is_changed(run, inputs, case):
    case.spoil(inputs)
    before = _snapshot(inputs)
    done = run(case.command)
    _check(case, done)
    assert _snapshot(inputs) == before


@pytest.mark.parametrize(
    "name", ["misspelt field", "broken JSON", "NaN in weights", "sampler that there is not"]
)
def test_a_process_of_its_own_ends_like_a_fork(inputs, name):
    case = CASES[name]
    case.spoil(inputs)
    command, *arguments = shlex.split(case.command)
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=inputs, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    _check(case, Finished(code=done.returncode, out=done.stdout, err=done.stderr))


# The name of the image and why it is bad; "{folder}" is the data root.
BAD_IMAGES = {
    "cut.jpg": r"cannot be decoded, truncated or damaged: ",
    "empty.png": r"the file is empty",
    "bomb.png": r"too large: .*, at most [\d,]+ pixels are decoded",
    "text.png": r"not a JPEG, PNG, WebP or GIF image",
    "folder.png": r"a directory, not an image file",
    "no.png": r"no such file",
    "link.png": r"leads out of the data root {folder} \(to /.*\); images must lie inside it",
    "../0.png": r"leads out of the data root {folder} \(to /.*/0.png\); images must lie inside it",
    "/etc/hostname": r"leads out of the data root {folder} \(to /etc/hostname\); images must lie inside it",
}


@pytest.fixture(scope="module")
def trained_on_bad_images(server, sound_inputs, tmp_path_factory):
    """Training on one example for each bad image and two good ones: how it ended, and its folder."""
    top = tmp_path_factory.mktemp("bad_images")
    folder = Path(shutil.copytree(sound_inputs, top / "inputs"))
    wrong.bad_images(folder)
    lines = [wrong.example(image=name) for name in (*BAD_IMAGES, "0.png", "1.png")]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    command = TRAIN + f" --config.batch_size={len(lines)} --config.steps=1"
    return _run(server, command, folder=folder, streams=top), folder


@pytest.mark.parametrize("image", BAD_IMAGES)
def test_a_bad_image_is_told_with_its_line_and_reason(trained_on_bad_images, image):
    done, folder = trained_on_bad_images
    number = list(BAD_IMAGES).index(image) + 1
    reason = f"image '{image}': " + BAD_IMAGES[image].format(folder=folder)
    assert re.search(f"Bad record, .*: {folder}/train.jsonl, line {number}: {reason}", done.err)
    records = {record["line"]: record for record in _read_jsonl(folder / "new" / "bad_records.jsonl")}
    assert records[number]["file"] == str(folder / "train.jsonl")
    assert re.fullmatch(f"{reason}.*", records[number]["reason"])


def test_too_many_bad_images_end_the_run_and_no_state_is_saved(trained_on_bad_images):
    done, folder = trained_on_bad_images
    _check(
        Case("", 3, r"9 of 11 rows .* config.data.max_bad_share; bad_records.jsonl .* mend them or allow"),
        done,
    )
    assert not (folder / "new" / "model.npz").exists()
    assert list((folder / "new" / "checkpoints").iterdir()) == []


def test_one_bad_record_below_the_share_costs_its_row_and_not_the_run(run, inputs):
    wrong.line(3, wrong.example(image="no.png"))(inputs)
    done = run(TRAIN + " --config.data.max_bad_share=0.2")
    assert (done.code, done.out) == (0, ""), done.err
    reason = {"file": str(inputs / "train.jsonl"), "line": 3, "reason": "image 'no.png': no such file"}
    assert _read_jsonl(inputs / "new" / "bad_records.jsonl") == [reason]
    # Two steps of four rows see each of the eight examples once.
    steps = [row for row in _read_jsonl(inputs / "new" / "metrics.jsonl") if "train/loss" in row]
    assert sorted(row["train/masked_rows"] for row in steps) == [0, 1]
    assert (inputs / "new" / "model.npz").exists() and (inputs / "new" / "report.html").exists()


def test_records_that_cannot_be_read_leave_the_others_answered(run, inputs):
    wrong.both(wrong.line(3, wrong.example(image="no.png")), wrong.line(5, "{'image'"))(inputs)
    done = run(ASK_DATA)
    message = (
        r"2 input\(s\) could not be read and have no answer:\n"
        r"  .*/train.jsonl, line 3: image 'no.png': no such file\n"
        r"  .*/train.jsonl, line 5: column 2: broken JSON: "
    )
    _check(Case("", 3, message), dataclasses.replace(done, out=""))
    answers = done.out.splitlines()
    rows = _read_jsonl(inputs / "new.jsonl")
    assert [row["index"] for row in rows] == list(range(wrong.EXAMPLES))
    assert [row["index"] for row in rows if row["prediction"] is None] == [2, 4]
    assert answers == [(row["prediction"] or "").replace("\n", "\\n") for row in rows]
    assert sorted(path.name for path in inputs.glob("new*")) == ["new.jsonl", "new.jsonl.job.json"]


def test_images_that_cannot_be_read_leave_the_others_answered(run, inputs):
    wrong.bad_images(inputs)
    done = run(ASK + " --images 0.png cut.jpg bomb.png 1.png")
    message = (
        r"2 input\(s\) could not be read and have no answer:\n"
        r"  --images: image 'cut.jpg': cannot be decoded, truncated or damaged: .*\n"
        r"  --images: image 'bomb.png': too large: "
    )
    _check(Case("", 3, message), dataclasses.replace(done, out=""))
    answered = [row["prediction"] is not None for row in _read_jsonl(inputs / "new.jsonl")]
    assert answered == [True, False, False, True]


def _read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
