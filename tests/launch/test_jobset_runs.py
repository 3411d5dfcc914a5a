"""Real jobs of two pods from a real manifest: agents and training processes, in the cluster of small_cluster.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.submission import default_name
from tests.launch.small_cluster import drain_node, install_kubectl, read_pods
from tests.tiny_runs import ROOT, losses, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

SUBMIT = [sys.executable, "-m", "launch.submit", "--to=jobset"]
SECONDS = 240  # for a run of 20 steps that compiles three times, on a busy machine


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    return write_config(folder / "config.py", tiny_config(write_inputs(folder), **{"checkpoint.every": 1}))


class Submitted:
    """The command in the foreground, and the cluster it talks to."""

    def __init__(self, tmp_path: Path, *command: str, flags: tuple[str, ...] = ()) -> None:
        self.state = tmp_path / "cluster"
        self.volume = tmp_path / "volume"
        self.volume.mkdir()
        self.workdir = self.volume / "a b;$(touch x)"
        has_workdir = command[0] == "launch.train"
        self.environment = install_kubectl(tmp_path / "bin", self.state) | {"PYTHONPATH": str(ROOT)}
        for chosen_by_tests in ("XLA_FLAGS", "JAX_PLATFORMS"):
            self.environment.pop(chosen_by_tests, None)
        self.log = tmp_path / "log"
        cluster = [
            "--image=pgdist",
            f"--volume=work:{self.volume}",
            "--nodes=2",
            "--devices_per_process=2",
            *flags,
        ]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *SUBMIT,
                    "--grace=60",
                    *cluster,
                    "--",
                    *command,
                    *[f"--workdir={self.workdir}"] * has_workdir,
                ],
                cwd=tmp_path,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ask(self, action: str) -> str:
        name = default_name(str(self.workdir))
        command = [sys.executable, "-c", ASK, action, name]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done after {SECONDS} s:\n{self.tail()}")

    def until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.tail()
            time.sleep(0.05)

    def steps(self) -> int:
        metrics = self.workdir / "metrics.jsonl"
        return (
            max(map(int, re.findall(r'"step": (\d+)', metrics.read_text())), default=0)
            if metrics.exists()
            else 0
        )

    def running(self, attempt: int) -> dict[int, str]:
        """The names of the attempt's running pods, by host."""
        pods = [pod for pod in read_pods(self.state) if pod["status"]["phase"] == "Running"]
        labels = [pod["metadata"]["labels"] for pod in pods]
        return {
            int(label["batch.kubernetes.io/job-completion-index"]): pod["metadata"]["name"]
            for pod, label in zip(pods, labels, strict=True)
            if label["jobset.sigs.k8s.io/restart-attempt"] == str(attempt)
        }

    def jobset(self) -> dict:
        return json.loads((self.state / "jobset.json").read_text())["status"]

    def tail(self) -> str:
        logs = sorted(self.state.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in [self.log, *logs])


# The module alone, as `launch.submit ACTION --to=jobset` uses it.
ASK = """
import sys
from absl import flags
from launch.targets import jobset
flags.FLAGS(["ask"])
answer = getattr(jobset, sys.argv[1])(jobset.find(sys.argv[2]))
print(answer or "", end="")
"""


@pytest.fixture
def submit(tmp_path) -> Iterator[Callable[..., Submitted]]:
    started: list[Submitted] = []

    def start(*command: str, flags: tuple[str, ...] = ()) -> Submitted:
        started.append(Submitted(tmp_path, *command, flags=flags))
        return started[-1]

    yield start
    for job in started:
        job.process.kill()
        job.process.wait()
        for end_now in ("killed", "deleted"):
            (job.state / end_now).touch()
        end = time.monotonic() + 10
        while any(pod["status"]["phase"] == "Running" for pod in read_pods(job.state)):
            assert time.monotonic() < end, job.tail()
            time.sleep(0.1)


def test_a_job_that_loses_its_node_and_then_a_pod_finishes_and_only_the_loss_counts(submit, config):
    job = submit("launch.train", f"--config={config}", flags=("--max_restarts=1",))
    job.until(lambda: job.steps() >= 2)
    drain_node(job.state, host=1)
    job.until(lambda: len(job.running(attempt=1)) == 2)
    at = job.steps()
    job.until(lambda: job.steps() >= at + 2)
    pods = {pod["metadata"]["name"]: pod for pod in read_pods(job.state)}
    assert "Running, " in job.ask("status") and all(name in job.ask("status") for name in pods)
    _kill_agent(job, host=1)

    assert job.wait() == 0, job.tail()

    assert job.jobset()["restarts"] == 2 and job.jobset()["restartsCountTowardsMax"] == 1, job.tail()
    assert sorted(losses(job.workdir)) == list(range(1, 21))
    verdicts = [json.loads(path.read_text()) for path in sorted(job.workdir.glob("attempts/*/verdict.json"))]
    assert [verdict["code"] for verdict in verdicts] == [42, 43, 0]
    assert len({verdict["job_id"] for verdict in verdicts}) == 1
    log = job.log.read_text()
    assert log.count("attempt 0: process 0") == log.count("attempt 1: process 0") == 1
    assert "attempt 2: process 0" in log and "agent 1:" not in log  # the first host's words are shown
    assert "Completed, 2 restarts, 1 of them of 1 after failures" in job.ask("status")
    assert "agent 1:" in job.ask("logs")
    assert list(job.volume.iterdir()) == [job.workdir]


def test_the_health_check_of_the_page_runs_on_two_pods(submit):
    job = submit("launch.env", "--check")

    assert job.wait() == 0, job.tail()
    assert job.jobset()["terminalState"] == "Completed"
    assert "processes: 2 on" in job.log.read_text() and "The job is healthy." in job.log.read_text(), (
        job.tail()
    )


def test_a_mistake_ends_the_jobset_at_once_with_its_code(submit, config):
    job = submit("launch.train", f"--config={config}", "--config.batch_size=7")

    assert job.wait() == 2, job.tail()

    assert job.jobset()["terminalState"] == "Failed" and job.jobset()["restarts"] == 0
    assert "failed with exit code 2" in job.jobset()["conditions"][0]["message"]


def test_ctrl_c_deletes_the_jobset_and_its_pods_save(submit, config):
    job = submit("launch.train", f"--config={config}")
    job.until(lambda: job.steps() >= 2)

    job.process.send_signal(signal.SIGINT)

    assert job.wait() == 42, job.tail()
    assert "state is saved" in job.log.read_text()
    assert not (job.state / "jobset.json").exists()
    assert job.ask("status") == ""


@pytest.mark.skipif(
    subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode != 0,
    reason="may not make a process namespace",
)
def test_the_agent_saves_and_ends_when_it_is_process_1_of_a_container(config, tmp_path):
    agent = [sys.executable, "-m", "launch.agent", f"--workdir={tmp_path}/work", "--devices_per_process=2"]
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    job = ["--", "launch.train", f"--config={config}", f"--workdir={tmp_path}/work"]
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    with (tmp_path / "log").open("w") as log:
        container = subprocess.Popen([*namespace, *agent, *job], cwd=ROOT, env=own, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        metrics = tmp_path / "work/metrics.jsonl"
        while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
            assert container.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        (first,) = psutil.Process(container.pid).children()
        assert re.search(r"NSpid:\s+\d+\s+1\n", Path(f"/proc/{first.pid}/status").read_text())

        first.send_signal(signal.SIGTERM)

        assert container.wait(timeout=SECONDS) == 42, (tmp_path / "log").read_text()
    finally:
        container.kill()
        container.wait()


def _kill_agent(job: Submitted, *, host: int) -> None:
    """What the kernel does to a pod without memory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launch.agent" in words and f"--host={host}".encode() in words:
            if f"--workdir={job.workdir}".encode() in words:
                os.kill(int(process.name), signal.SIGKILL)
                return
    pytest.fail(f"no agent of host {host}:\n{job.tail()}")
