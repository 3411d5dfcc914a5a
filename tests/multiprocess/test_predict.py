"""Predictions of jobs that are killed: every input is answered, once, as by a job that nobody has disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgdist import weights
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.launch import wrong_inputs
from tests.local_jobs import LocalJob
from tests.models.small import random_parameters
from tests.tiny_runs import ROOT, read_jsonl

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

INPUTS = 1001
SECONDS = 200
BAD = 502  # an input whose image is not there; of two processes, the second reads it


@pytest.fixture
def chance() -> random.Random:
    """Which moments are chosen; a test that fails shows the seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"chance: random.Random({seed})")
    return random.Random(seed)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`run`, a finished run, and `many.jsonl`, of which one line asks about an image that is not there."""
    folder = tmp_path_factory.mktemp("inputs")
    wrong_inputs.write_inputs(folder)
    weights.save(folder / "run" / "model.npz", flatten(random_parameters(PRESETS["tiny"], seed=0)))
    shutil.copy(folder / "tokenizer.model", folder / "run")
    config = folder / "run" / "config.json"
    config.write_text(config.read_text().replace('"tokenizer.model"', f'"{folder}/tokenizer.model"'))
    lines = [
        wrong_inputs.example(image="no.png" if i == BAD else f"{i % 8}.png", prefix=f"point {i % 5}")
        for i in range(INPUTS)
    ]
    (folder / "many.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def command(inputs: Path, run: Path, out: Path) -> list[str]:
    flags = ["--sampler=sample", "--seed=5", "--max_new_tokens=3", "--logprobs", "--batch_size=4"]
    return ["launch.predict", f"--workdir={run}", f"--data={inputs}/many.jsonl", f"--out={out}", *flags]


def start(inputs: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command(inputs, inputs / "run", out), "--fake_devices=2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[str]:
    """What it prints; it ends with the code of an input that cannot be read."""
    answers, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 3
    return answers.splitlines()


def wait_for_rows(out: Path, count: int, *, process: subprocess.Popen) -> None:
    """Returns when the process has written so many."""
    end = time.monotonic() + SECONDS
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The file of a job of one process that ran from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    answers = finish(start(inputs, out))
    rows = read_jsonl(out)
    assert [row["index"] for row in rows] == list(range(INPUTS))
    assert [row["index"] for row in rows if row["prediction"] is None] == [BAD]
    assert len(answers) == INPUTS and len(set(answers)) > INPUTS / 2
    return out


def test_killed_twice_at_random_moments_a_job_answers_each_input_once(inputs, whole, chance, tmp_path):
    out, printed = tmp_path / "out.jsonl", []
    for rows in sorted(chance.sample(range(1, INPUTS - 200), 2)):
        process = start(inputs, out)
        wait_for_rows(out, rows, process=process)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        answers, _ = process.communicate()
        printed += answers.splitlines()
        print(f"killed at {out.read_bytes().count(bytes([10]))} rows")
        assert process.returncode == -signal.SIGKILL
    printed += finish(start(inputs, out))

    assert out.read_bytes() == whole.read_bytes()
    # A line is printed after its row is written: only that of a killed run's last row may be missing.
    assert INPUTS - 2 <= len(printed) <= INPUTS


def test_killed_before_it_has_answered_anything_a_job_begins_again(inputs, whole, chance, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(inputs, out)
    time.sleep(chance.uniform(0, 4))
    process.kill()
    process.communicate()
    finish(start(inputs, out))
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_one_of_them_killed_write_the_file_that_one_writes(
    inputs, whole, chance, tmp_path, victim
):
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    shutil.copytree(inputs / "run", run)
    flags = ("--processes=2", "--devices_per_process=1", "--backoff=0")
    with LocalJob(*flags, command=command(inputs, run, out), workdir=run) as job:
        wait_for_rows(out, chance.randrange(1, INPUTS - 200), process=job.agent)
        os.kill(job.pids()[victim], signal.SIGKILL)
        assert job.wait() == 3, job.tail()

    assert len(job.attempts()) == 2
    assert out.read_bytes() == whole.read_bytes()
