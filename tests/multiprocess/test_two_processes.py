"""The train command in two processes of four devices each: the same result as in one, whole ends, no orphans.

Every run is real: `python -m launch.train`, joined over TCP on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.command_line import load_config
from pgdist.finetune import finetune
from tests.tiny_runs import (
    ROOT,
    Inputs,
    assert_same_bits,
    host,
    largest_difference,
    losses,
    read_jsonl,
    tiny_config,
    write_config,
    write_inputs,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

SECONDS = 200  # for a run of 20 steps that compiles, on a busy machine
STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config_file(inputs, tmp_path_factory) -> Path:
    evaluated = {"data.validation": str(inputs.validation), "eval.every": 8}
    config = tiny_config(inputs, **evaluated, **{"mesh.data": 2, "export": True})
    return write_config(tmp_path_factory.mktemp("config") / "config.py", config)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pair:
    """Two processes of one job; leaving the `with` ends what is left of them."""

    def __init__(self, module: str, *flags: str, log: Path) -> None:
        # Each process compiles for itself, as a user's would.
        chosen_by_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
        environment = {name: value for name, value in os.environ.items() if name not in chosen_by_tests}
        environment["PYTHONPATH"] = str(ROOT)
        address = f"127.0.0.1:{free_port()}"
        self.logs = [log.with_name(f"{log.name}_{number}.log") for number in range(2)]
        self.processes = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-m", module, *flags, "--fake_devices=4"]
            command += [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}"]
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, *, seconds: float = SECONDS) -> list[int]:
        """The exit codes of both, once both have ended; fails the test after `seconds`."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(timeout=end - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {seconds} s:\n{self.tails()}")

    def tails(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def wait_for_step(self, metrics: Path, step: int) -> None:
        """Returns when the step stands in metrics.jsonl."""
        end = time.monotonic() + SECONDS
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert time.monotonic() < end and not any(p.poll() is not None for p in self.processes), (
                self.tails()
            )
            time.sleep(0.02)


def training(config: Path, workdir: Path, *flags: str) -> Pair:
    return Pair("launch.train", f"--config={config}", f"--workdir={workdir}", *flags, log=workdir)


def exported(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "model.npz") as file:
        return {name: file[name] for name in file.files}


def predictions(workdir: Path) -> dict[str, list[str]]:
    paths = sorted((workdir / "predictions").iterdir())
    return {path.name: [row["prediction"] for row in read_jsonl(path)] for path in paths}


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory) -> Iterator[Path]:
    """The workdir of a run of two processes from beginning to end."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "work"
    with training(config_file, workdir) as pair:
        assert pair.wait() == [0, 0], pair.tails()
    return workdir


def test_two_processes_train_what_one_process_with_their_devices_trains(undisturbed, inputs, tmp_path):
    evaluated = {"data.validation": str(inputs.validation), "eval.every": 8}
    one = finetune(tiny_config(inputs, **evaluated, **{"mesh.data": 2}), workdir=tmp_path / "one")

    assert predictions(undisturbed) == predictions(tmp_path / "one")
    assert losses(undisturbed) == pytest.approx(losses(tmp_path / "one"), rel=0, abs=1e-5)
    assert largest_difference(exported(undisturbed), host(one.params)) <= 1e-5


def test_sigterm_to_one_stops_both_and_the_next_start_ends_bitwise_like_an_undisturbed_run(
    undisturbed, config_file, tmp_path
):
    workdir = tmp_path / "interrupted"
    # A checkpoint at each step makes steps slow enough to be interrupted between.
    with training(config_file, workdir, "--config.checkpoint.every=1") as pair:
        pair.wait_for_step(workdir / "metrics.jsonl", 2)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [42, 42], pair.tails()
    reached = max(losses(workdir))
    assert 2 <= reached < STEPS
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == reached
    assert not (workdir / "model.npz").exists()
    shutil.copytree(workdir, tmp_path / "alone")

    with training(config_file, workdir) as pair:
        assert pair.wait() == [0, 0], pair.tails()

    assert f"Resumed from the checkpoint of step {reached}" in pair.logs[0].read_text()
    assert losses(workdir) == losses(undisturbed)
    steps = [row["step"] for row in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert_same_bits(exported(workdir), exported(undisturbed))

    alone = finetune(load_config(str(config_file)), workdir=tmp_path / "alone")  # one process, eight devices
    assert losses(tmp_path / "alone") == pytest.approx(losses(undisturbed), rel=0, abs=1e-5)
    assert largest_difference(host(alone.params), exported(undisturbed)) <= 1e-5


def questions(inputs: Inputs) -> Path:
    """The longest prompt of the first eight is the first process's, that of the next eight the second's."""
    records = read_jsonl(inputs.train)
    for number in (0, 13):
        records[number]["prefix"] = "circle " * 15
    path = inputs.train.with_name("questions.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_two_processes_answer_what_one_answers_and_one_of_them_writes(undisturbed, inputs, tmp_path):
    flags = [f"--workdir={undisturbed}", f"--data={questions(inputs)}", "--batch_size=8"]
    with Pair("launch.predict", *flags, f"--out={tmp_path / 'two.jsonl'}", log=tmp_path / "predict") as pair:
        assert pair.wait() == [0, 0], pair.tails()

    evaluated = [*flags, f"--out={tmp_path / 'one.jsonl'}", "--fake_devices=8"]
    subprocess.run(
        [sys.executable, "-m", "launch.predict", *evaluated], cwd=ROOT, check=True, timeout=SECONDS
    )

    answers = read_jsonl(tmp_path / "one.jsonl")
    assert [row["index"] for row in answers] == list(range(len(answers)))
    assert read_jsonl(tmp_path / "two.jsonl") == answers
    assert len(answers) == len(read_jsonl(inputs.train))


def test_a_workdir_of_another_config_ends_both_with_code_2(undisturbed, config_file):
    with training(config_file, undisturbed, "--config.seed=1") as pair:
        assert pair.wait(seconds=60) == [2, 2], pair.tails()

    assert "config.seed: 0 -> 1" in pair.logs[0].read_text()


def test_a_mistake_in_the_config_ends_both_at_once_with_code_2(config_file, tmp_path):
    with training(config_file, tmp_path / "wrong", "--config.batch_size=12") as pair:
        # Far less than the minutes that JAX waits for a peer that has gone.
        assert pair.wait(seconds=60) == [2, 2], pair.tails()

    assert all("config.batch_size=12" in log.read_text() for log in pair.logs)
    assert not (tmp_path / "wrong").exists()
