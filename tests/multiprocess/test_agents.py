"""Jobs of one agent and of two, on one machine, and what their agents do where a process or an agent fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.local_jobs import LocalJob
from tests.multiprocess.processes import free_port
from tests.tiny_runs import ROOT, Inputs, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

# A config file is a program. This one makes process 1 hang for ever at its fifth batch, once.
HANGS = """
import os, time
if os.environ.get("PGDIST_PROCESS_ID") == "1" and os.environ.get("PGDIST_ATTEMPT") == "000":
    from pgdist.train import loop
    fetch = loop.Loop._next_batch
    def hang_for_ever(self, *arguments, **named):
        hang_for_ever.calls += 1
        while hang_for_ever.calls == 5:
            time.sleep(1)
        return fetch(self, *arguments, **named)
    hang_for_ever.calls = 0
    loop.Loop._next_batch = hang_for_ever
"""

DIES = """
import os, signal
from pgdist.train import loop
def die(self, *arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
loop.Loop._next_batch = die
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def config(folder: Path, inputs: Inputs, code: str = "", **fields: object) -> Path:
    path = write_config(folder / "config.py", tiny_config(inputs, **{"checkpoint.every": 4, **fields}))
    path.write_text(code + path.read_text())
    return path


def training(config: Path, workdir: Path) -> list[str]:
    return ["launch.train", f"--config={config}", f"--workdir={workdir}"]


def test_a_process_that_hangs_is_found_by_its_silence_and_its_log_says_where(inputs, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--processes=2", "--devices_per_process=1", "--silence=stepping=4,saving=60", "--backoff=0")
    with LocalJob(*flags, command=training(config(tmp_path, inputs, HANGS), workdir), workdir=workdir) as job:
        assert job.wait() == 0, job.tail()

    assert job.verdict(0)["code"] == 43
    assert "no sign of life for 4 s, in stepping" in job.verdict(0)["reason"]
    assert "in hang_for_ever" in (workdir / "logs/process_001.log").read_text()
    assert job.verdict(1)["code"] == 0


def test_a_job_that_always_fails_is_given_up(inputs, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--devices_per_process=1", "--max_restarts=2", "--backoff=0.1")
    with LocalJob(*flags, command=training(config(tmp_path, inputs, DIES), workdir), workdir=workdir) as job:
        assert job.wait() == 128 + signal.SIGKILL, job.tail()

    assert len(job.attempts()) == 3
    assert "given up after 2 restarts" in job.tail()


def test_a_workdir_in_use_is_refused_and_a_killed_agent_leaves_it_free(inputs, tmp_path):
    workdir = tmp_path / "run"
    command = training(config(tmp_path, inputs, **{"steps": 3000}), workdir)
    with LocalJob("--devices_per_process=1", command=command, workdir=workdir) as first:
        first.wait_for_beat(lambda beat: beat.step >= 9)  # the checkpoint of step 4 is whole when 8's begins
        second = subprocess.run(
            [sys.executable, "-m", "launch.submit", "--to=local", "--devices_per_process=1", "--", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 2 and "is in use" in second.stderr
        first.agent.kill()
        assert first.wait() == -signal.SIGKILL
        assert first.orphans() == []
    with LocalJob("--devices_per_process=1", command=command, workdir=workdir) as third:
        third.wait_for_beat(lambda beat: beat.step >= 10)
        os.kill(third.agent.pid, signal.SIGTERM)
        assert third.wait() == 42

    assert "Resumed from the checkpoint of step" in third.tail()


def test_status_logs_and_cancel_find_a_detached_job(inputs, tmp_path):
    workdir = tmp_path / "a b;$(touch x)"
    command = training(config(tmp_path, inputs, **{"steps": 3000}), workdir)

    def submit(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launch.submit", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    with LocalJob(
        "--detach", "--processes=2", "--devices_per_process=1", command=command, workdir=workdir
    ) as job:
        assert job.wait(seconds=30) == 0
        lease = job.until(lambda: job.attempt().exists() and job.attempt() / "lease.json")
        job.until(lambda: job.beat(0) and job.beat(0).step >= 2)
        assert lease.exists()
        assert "process 1 on" in submit("status", f"--workdir={workdir}").stdout
        assert "[1] " in submit("logs", f"--workdir={workdir}").stdout
        cancelled = submit("cancel", f"--workdir={workdir}")
        assert cancelled.returncode == 0 and "to save and end" in cancelled.stdout
        assert job.verdict()["code"] == 42
        assert job.orphans() == []

    assert "code 42 after" in submit("status", f"--workdir={workdir}").stdout
    again = submit("cancel", f"--workdir={workdir}")
    assert again.returncode == 2 and "no job runs in it" in again.stderr


class TwoHosts:
    """Two agents of one job, as on two hosts; leaving the `with` ends what is left."""

    def __init__(self, command: list[str], *, workdirs: list[Path], log: Path) -> None:
        self.logs = [log.with_name(f"{log.name}_{host}.out") for host in range(2)]
        flags = [
            "--hosts=2",
            f"--rendezvous=127.0.0.1:{free_port()}",
            "--job_id=7",
            "--devices_per_process=2",
        ]
        self.agents = []
        for host, (workdir, out) in enumerate(zip(workdirs, self.logs, strict=True)):
            own = [f"--workdir={workdir}", f"--host={host}", "--join_timeout=10"]
            with out.open("w") as output:
                self.agents.append(
                    psutil.Popen(
                        [sys.executable, "-m", "launch.agent", *flags, *own, "--", *command],
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            if agent.is_running():
                for child in agent.children(recursive=True):
                    child.kill()
                agent.kill()
            agent.wait(30)

    def wait(self, *, seconds: float = 100) -> list[int]:
        end = time.monotonic() + seconds
        return [agent.wait(timeout=max(0.1, end - time.monotonic())) for agent in self.agents]

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + 100
        while not path.exists():
            assert time.monotonic() < end and all(agent.is_running() for agent in self.agents), self.tails()
            time.sleep(0.02)

    def tails(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)


@pytest.fixture
def two(inputs, tmp_path):
    workdir = tmp_path / "run"
    command = training(config(tmp_path, inputs, **{"steps": 3000}), workdir)
    with TwoHosts(command, workdirs=[workdir, workdir], log=tmp_path / "agent") as hosts:
        hosts.wait_for(workdir / "checkpoints" / "8")
        yield hosts


def test_a_signal_to_one_agent_stops_the_processes_of_both(two, tmp_path):
    two.agents[1].send_signal(signal.SIGTERM)

    assert two.wait() == [42, 42], two.tails()
    assert (tmp_path / "run/attempts/000/host_001.json").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_ends_the_other_within_ten_seconds_with_43(two, lost):
    processes = two.agents[lost].children(recursive=True)
    two.agents[lost].send_signal(signal.SIGKILL)

    assert two.agents[1 - lost].wait(timeout=10) == 43, two.tails()
    assert f"host {lost} was lost" in two.logs[1 - lost].read_text()
    assert not psutil.wait_procs(processes, timeout=5)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_of_one_host_ends_both_within_ten_seconds_with_43(two, number):
    (process,) = [p for p in two.agents[1].children() if "launch.train" in p.cmdline()]
    process.send_signal(number)

    assert two.wait(seconds=10) == [43, 43], two.tails()


def test_a_stopped_agent_is_a_lost_host(two):
    two.agents[1].send_signal(signal.SIGSTOP)

    assert two.agents[0].wait(timeout=20) == 43, two.tails()
    two.agents[1].send_signal(signal.SIGCONT)
    assert two.agents[1].wait(timeout=20) == 43


def test_hosts_that_do_not_share_the_workdir_end_with_2_and_say_so(inputs, tmp_path):
    command = training(config(tmp_path, inputs), tmp_path / "run")
    with TwoHosts(command, workdirs=[tmp_path / "run", tmp_path / "other"], log=tmp_path / "agent") as hosts:
        assert hosts.wait() == [2, 2], hosts.tails()

    assert "must lie on a filesystem that all hosts share" in hosts.logs[1].read_text()
