"""Whole runs in a bucket, as a user starts them: stopped, gone on with elsewhere, and asked for answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pgdist import files
from tests.tiny_runs import ROOT, Inputs, assert_same_bits, losses, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 200
STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config_file(inputs, tmp_path_factory) -> Path:
    fields = {
        "data.validation": str(inputs.validation),
        "eval.every": 8,
        "checkpoint.every": 4,
        "export": True,
    }
    return write_config(tmp_path_factory.mktemp("config") / "config.py", tiny_config(inputs, **fields))


class Run:
    """A `launch.train` of one or several processes; leaving the `with` ends what is left of it."""

    def __init__(self, config: Path, workdir: str, *flags: str, log: Path, count: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(log.parent)}
        command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}", *flags]
        command += [f"--fake_devices={4 // count}"]
        job = [f"--coordinator={address}", f"--num_processes={count}"] if count > 1 else []
        self.logs = [log.with_name(f"{log.name}_{number}.log") for number in range(count)]
        self.processes = []
        for number, path in enumerate(self.logs):
            own = [*job, f"--process_id={number}"] if job else []
            with path.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *own], env=environment, stdout=output, stderr=output, cwd=ROOT
                    )
                )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def codes(self) -> list[int]:
        end = time.monotonic() + SECONDS
        try:
            return [process.wait(timeout=end - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {SECONDS} s:\n{self.output()[-5000:]}")

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + SECONDS
        while text not in self.output():
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < end, self.output()[-5000:]
            time.sleep(0.05)


def steps_in(folder) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_a_run_in_a_bucket_that_is_stopped_and_goes_on_is_the_run_on_a_disk(
    bucket_folder, config_file, tmp_path, count
):
    with Run(config_file, str(tmp_path / "disk"), log=tmp_path / "disk", count=count) as run:
        assert run.codes() == [0] * count, run.output()

    folder = files.folder(bucket_folder)
    with Run(config_file, bucket_folder, log=tmp_path / "first", count=count) as run:
        run.wait_for("step 8: validation loss")
        run.processes[-1].send_signal(signal.SIGTERM)
        assert run.codes() == [42] * count, run.output()
    reached = max(steps_in(folder))
    assert 8 <= reached < STEPS
    assert max(int(name) for name in names_in(folder / "checkpoints") if name.isdecimal()) == reached
    assert "model.npz" not in names_in(folder)

    with Run(config_file, bucket_folder, log=tmp_path / "second", count=count) as run:
        assert run.codes() == [0] * count, run.output()
    assert f"Resumed from the checkpoint of step {reached}" in run.output()
    assert steps_in(folder) == list(range(1, STEPS + 1))
    assert names_in(folder) >= {
        "config.json", "data.json", "env.json", "parameters.json", "examples.jsonl", "metrics.jsonl", "tb",
        "predictions", "report.html", "checkpoints", "model.npz",
    }  # fmt: skip
    assert names_in(folder / "predictions") == names_in(tmp_path / "disk" / "predictions")
    (tmp_path / "bucket").mkdir()
    for name in ("metrics.jsonl", "model.npz"):
        (tmp_path / "bucket" / name).write_bytes((folder / name).read_bytes())
    assert losses(tmp_path / "bucket") == losses(tmp_path / "disk")
    with (
        np.load(tmp_path / "bucket" / "model.npz") as found,
        np.load(tmp_path / "disk" / "model.npz") as expected,
    ):
        assert_same_bits(dict(found), dict(expected))
    assert not list(tmp_path.glob("pgdist_*"))  # the local folders


def test_a_killed_run_in_a_bucket_goes_on_without_a_gap_in_its_metrics(bucket_folder, config_file, tmp_path):
    with Run(config_file, bucket_folder, log=tmp_path / "first") as run:
        run.wait_for("step 8: validation loss")
        run.processes[0].kill()
    with Run(config_file, bucket_folder, log=tmp_path / "second") as run:
        assert run.codes() == [0], run.output()
    assert "Resumed from the checkpoint of step" in run.output()
    assert steps_in(files.folder(bucket_folder)) == list(range(1, STEPS + 1))


def test_answers_come_from_a_model_in_a_bucket(bucket_folder, config_file, inputs, tmp_path):
    short = ["--config.steps=2", "--config.schedule.warmup=0", "--config.data.validation="]
    with Run(config_file, bucket_folder, *short, log=tmp_path / "train") as run:
        assert run.codes() == [0], run.output()
    done = subprocess.run(
        [sys.executable, "-m", "launch.predict", f"--workdir={bucket_folder}", f"--data={inputs.validation}"],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert not list(tmp_path.glob("pgdist_*"))
