"""SIGTERM in whatever a job does: its state is saved, all of it ends with 42, and the next start goes on.

Every job is real: an agent with one training process of eight devices, or with four of two.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.local_jobs import LocalJob
from tests.tiny_runs import ROOT, Inputs, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

GRACE = 60

# A config file is a program: this one stands for a slow disk and a long evaluation.
SLOW = """
import time
import pgdist.checkpoint, pgdist.job

def slowed(call):
    def slow(*arguments, **named):
        time.sleep(1.0)
        return call(*arguments, **named)
    return slow

pgdist.job.Job.load_weights = slowed(pgdist.job.Job.load_weights)
pgdist.job.Job.evaluate = slowed(pgdist.job.Job.evaluate)
pgdist.checkpoint.Checkpoints.save = slowed(pgdist.checkpoint.Checkpoints.save)
"""

PHASES = {
    "loading": lambda beat: beat.phase == "loading",
    "compiling": lambda beat: beat.phase == "compiling",
    "stepping": lambda beat: beat.phase == "stepping" and beat.step >= 2,
    "saving": lambda beat: beat.phase == "saving" and beat.step >= 4,
    "evaluating": lambda beat: beat.phase == "evaluating" and beat.step >= 6,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config_file(inputs, tmp_path_factory) -> Path:
    fields = {"data.validation": str(inputs.validation), "eval.every": 6, "checkpoint.every": 4, "steps": 12}
    path = tmp_path_factory.mktemp("config") / "config.py"
    write_config(path, tiny_config(inputs, **fields, **{"mesh.data": 2, "export": True}))
    path.write_text(SLOW + path.read_text())
    return path


def training(config: Path, workdir: Path, *, processes: int) -> LocalJob:
    command = ["launch.train", f"--config={config}", f"--workdir={workdir}"]
    flags = [f"--processes={processes}", f"--devices_per_process={8 // processes}", f"--grace={GRACE}"]
    return LocalJob(*flags, command=command, workdir=workdir)


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_saves_and_ends_with_42(phase, processes, config_file, tmp_path):
    workdir = tmp_path / "run"
    with training(config_file, workdir, processes=processes) as job:
        beat = job.wait_for_beat(PHASES[phase], process=processes - 1)
        os.kill(job.agent.pid, signal.SIGTERM)
        asked = time.monotonic()
        assert job.wait(seconds=GRACE + 20) == 42, job.tail()
        seconds = time.monotonic() - asked
        assert not job.orphans()

    assert seconds < GRACE
    (stopped_after,) = set(re.findall(r"Stopped as asked after step (\d+) of 12", job.tail()))
    assert int(stopped_after) == saved_steps(workdir)[-1] >= beat.step
    assert (
        int(stopped_after) <= max(beat.step, 0) + 4
    )  # the step in hand, the one that carries the wish, the next
    assert {process["code"] for process in job.host()["processes"]} == {42}
    assert job.verdict()["code"] == 42


def test_a_signal_before_the_processes_can_hear_it_is_kept_for_them(config_file, tmp_path):
    with training(config_file, tmp_path / "run", processes=4) as job:
        job.until(lambda: job.pids())
        assert all(job.beat(process) is None for process in range(4))  # still importing
        for pid in (job.agent.pid, *job.pids().values()):  # as a scheduler does that signals everybody
            os.kill(pid, signal.SIGTERM)
        assert job.wait(seconds=GRACE) == 42, job.tail()

    assert saved_steps(tmp_path / "run") == [0]


def test_a_second_signal_ends_all_at_once_and_harms_nothing(config_file, tmp_path):
    workdir = tmp_path / "run"
    with training(config_file, workdir, processes=2) as job:
        job.wait_for_beat(lambda beat: beat.phase == "saving" and beat.step >= 8)
        os.kill(job.agent.pid, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(job.agent.pid, signal.SIGTERM)
        assert job.wait(seconds=5) == 128 + signal.SIGKILL, job.tail()
        assert not job.orphans()
    with training(config_file, workdir, processes=2) as job:
        job.wait_for_beat(PHASES["stepping"])

    assert "Resumed from the checkpoint of step" in job.tail()
    assert "set aside" not in job.tail()


def stopped_in(phase: str, slow_call: str, inputs: Inputs, tmp_path: Path) -> tuple[int, LocalJob]:
    """The code of a job that is stopped in `phase`, in which it stays for minutes, with a grace of two seconds."""
    config = write_config(tmp_path / "config.py", tiny_config(inputs, **{"checkpoint.every": 2}))
    code = SLOW.partition("pgdist.job.Job.load_weights =")[0].replace("1.0", "300")
    config.write_text(f"{code}{slow_call} = slowed({slow_call})\n{config.read_text()}")
    command = ["launch.train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    with LocalJob("--devices_per_process=2", "--grace=2", command=command, workdir=tmp_path / "run") as job:
        job.wait_for_beat(lambda beat: beat.phase == phase)
        os.kill(job.agent.pid, signal.SIGTERM)
        return job.wait(seconds=15), job


def test_a_job_that_does_not_save_in_time_is_ended(inputs, tmp_path):
    code, job = stopped_in("saving", "pgdist.checkpoint.Checkpoints.save", inputs, tmp_path)

    assert code == 43
    assert "not done 2 s after being asked to stop" in job.verdict()["reason"]
    assert "in slow" in (tmp_path / "run/logs/process_000.log").read_text()  # the stacks


def test_a_job_that_does_not_load_in_time_has_nothing_to_save(inputs, tmp_path):
    code, job = stopped_in("loading", "pgdist.job.Job.load_weights", inputs, tmp_path)

    assert code == 42
    assert "nothing new to save" in job.verdict()["reason"]


class Alone:
    """`python -m launch.train` without an agent."""

    def __init__(self, config: Path, workdir: Path) -> None:
        self.log = workdir.with_name("alone.log")
        command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--fake_devices=8"], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 100
        while text not in self.log.read_text():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)


def test_without_an_agent_a_signal_while_loading_saves_too(config_file, tmp_path):
    with Alone(config_file, tmp_path / "run") as alone:
        alone.wait_for("Training data:")
        alone.process.send_signal(signal.SIGTERM)
        assert alone.process.wait(timeout=100) == 42, alone.log.read_text()

    assert saved_steps(tmp_path / "run") == [0]


def test_without_an_agent_a_second_signal_ends_at_once(config_file, tmp_path):
    with Alone(config_file, tmp_path / "run") as alone:
        alone.wait_for("Training data:")
        alone.process.send_signal(signal.SIGINT)
        alone.wait_for("a second signal ends at once")
        time.sleep(0.5)  # at once it would be the same request
        alone.process.send_signal(signal.SIGINT)
        assert alone.process.wait(timeout=2) == 128 + signal.SIGINT
