"""Jobs under a real Slurm of two nodes: they end as they should, whatever happens to them.

Each trains for real, one process of two simulated devices a node, and must end with the very parameters of a run
that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SECONDS, Job, environment, submit, training
from tests.tiny_runs import ROOT, assert_same_bits, losses, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 20
SECONDS_TO_COME_BACK = 8.0  # by when a job that had been put back would run
SAVE_ALWAYS = "--config.checkpoint.every=1"  # which also makes steps slow enough to come between them
DETACHED = ("--to=slurm", "--nodes=2", "--detach")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    fields = {"mesh.data": 2, "export": True, "steps": STEPS}
    return write_config(folder / "config.py", tiny_config(write_inputs(folder), **fields))


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster, config, tmp_path_factory) -> Path:
    """The workdir of a job from beginning to end, followed by the command that started it."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "a b;$(touch x) 100%j"
    done = submit(slurm_cluster, "--to=slurm", "--nodes=2", *training(config, workdir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout and "COMPLETED" in done.stderr
    assert not (ROOT / "x").exists()
    return workdir


def start(cluster: Cluster, config: Path, workdir: Path, *flags: str) -> Job:
    done = submit(cluster, *DETACHED, *flags, *training(config, workdir, SAVE_ALWAYS))
    assert done.returncode == 0, done.stderr
    return Job(cluster, workdir)


def parameters(workdir: Path) -> Mapping[str, np.ndarray]:
    with np.load(workdir / "model.npz") as file:
        return {name: file[name] for name in file.files}


def assert_as_if_undisturbed(workdir: Path, undisturbed: Path) -> None:
    assert losses(workdir) == losses(undisturbed)
    assert_same_bits(parameters(workdir), parameters(undisturbed))


def test_a_job_that_is_signalled_and_then_preempted_saves_and_goes_on_each_time(
    slurm_cluster, config, undisturbed, tmp_path
):
    job = start(slurm_cluster, config, tmp_path / "work", "--sbatch_line=--exclusive")

    job.wait_for_training(attempt=0)
    slurm_cluster.run("scancel", "--batch", "--signal=TERM", job.id)
    job.wait_for_state("PENDING", restarts=1)
    assert job.codes() == [42], job.log()

    # Slurm asks all processes of the agents' step to end, and would take the nodes a minute later.
    job.wait_for_training(attempt=1)
    slurm_cluster.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    job.wait_for_state("PENDING", restarts=2)
    assert job.codes() == [42, 42], job.log()

    assert job.wait_for_state("COMPLETED", "FAILED", restarts=2).code == 0, job.log()
    assert job.codes() == [42, 42, 0]
    assert_as_if_undisturbed(job.workdir, undisturbed)


def test_a_job_that_loses_a_process_then_an_agent_then_a_node_goes_on_each_time(
    slurm_cluster, config, undisturbed, tmp_path
):
    job = start(slurm_cluster, config, tmp_path / "work")

    job.wait_for_training(attempt=0)
    os.kill(job.processes(1, attempt=0)["processes"][0]["pid"], signal.SIGKILL)
    job.wait_for_state("PENDING", restarts=1)

    job.wait_for_training(attempt=1)
    os.kill(job.processes(1, attempt=1)["agent_pid"], signal.SIGKILL)
    job.wait_for_state("PENDING", restarts=2)
    assert job.codes() == [43, 43], job.log()

    job.wait_for_training(attempt=2)
    slurm_cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for_state("PENDING", restarts=3)
    assert "DUE TO NODE FAILURE" in job.log()
    slurm_cluster.run("scontrol", "update", "nodename=n2", "state=resume")

    assert job.wait_for_state("COMPLETED", "FAILED", restarts=3).code == 0, job.log()
    assert_as_if_undisturbed(job.workdir, undisturbed)


def test_cancel_saves_and_ends_a_job_for_good(slurm_cluster, config, tmp_path):
    workdir = tmp_path / "work"
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.submit",
            "--to=slurm",
            "--nodes=2",
            *training(config, workdir, SAVE_ALWAYS),
        ],
        env=environment(slurm_cluster),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        job = Job(slurm_cluster, workdir)
        job.wait_for_training(attempt=0)
        status = submit(slurm_cluster, "status", f"--workdir={workdir}").stdout
        assert f"job {job.id}: RUNNING on n[1-2]\nattempt 0: running" in status
        assert "process 1 on" in status

        assert submit(slurm_cluster, "cancel", f"--workdir={workdir}").returncode == 0
        assert follower.wait(timeout=SECONDS) == 42, follower.stderr.read()

    assert (workdir / "checkpoints").exists() and not (workdir / "model.npz").exists()
    time.sleep(SECONDS_TO_COME_BACK)
    assert (job.state().word, job.state().code, job.state().restarts) == ("FAILED", 42, 0)
    assert f"step 1/{STEPS}" in submit(slurm_cluster, "logs", f"--workdir={workdir}").stdout
    again = submit(slurm_cluster, "cancel", f"--workdir={workdir}")
    assert again.returncode == 2 and "has ended already" in again.stderr


def test_plain_scancel_ends_a_job_for_good(slurm_cluster, config, tmp_path):
    job = start(slurm_cluster, config, tmp_path / "work")
    job.until(lambda: job.processes(0, attempt=0)["processes"][0]["phase"] != "starting")
    slurm_cluster.run("scancel", job.id)

    job.until(lambda: job.codes() == [42])
    job.wait_for_state("CANCELLED")
    time.sleep(SECONDS_TO_COME_BACK)
    assert job.state().word == "CANCELLED"


def test_in_an_allocation_a_job_runs_at_once_and_again_after_a_loss(
    slurm_cluster, config, undisturbed, tmp_path
):
    workdir = tmp_path / "work"
    own = ["--to=slurm", "--backoff=1", *training(config, workdir, SAVE_ALWAYS)]
    with subprocess.Popen(
        ["salloc", "--nodes=2", sys.executable, "-m", "launch.submit", *own],
        env=environment(slurm_cluster),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        job = Job(slurm_cluster, workdir)
        job.wait_for_training(attempt=0)
        os.kill(job.processes(1, attempt=0)["processes"][0]["pid"], signal.SIGKILL)
        output, _ = shell.communicate(timeout=SECONDS)

    assert shell.returncode == 0, output
    assert job.codes() == [43, 0] and "restart 1 of 10" in output
    assert_as_if_undisturbed(workdir, undisturbed)


def test_ctrl_c_in_an_allocation_saves_and_ends_the_job_on_some_of_its_nodes(slurm_cluster, config, tmp_path):
    workdir = tmp_path / "work"
    own = ["--to=slurm", "--in_allocation", "--nodes=1", *training(config, workdir, SAVE_ALWAYS)]
    with subprocess.Popen(
        ["salloc", "--nodes=2", sys.executable, "-m", "launch.submit", *own],
        env=environment(slurm_cluster),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        job = Job(slurm_cluster, workdir)
        job.until(lambda: job.processes(0, attempt=0)["processes"][0]["phase"] != "starting")
        (command,) = [
            child for child in psutil.Process(shell.pid).children() if "launch.submit" in child.cmdline()
        ]
        command.send_signal(signal.SIGINT)
        output, _ = shell.communicate(timeout=SECONDS)

    assert shell.returncode == 42, output
    assert job.codes() == [42] and "preempted, state saved" in output


def test_each_process_of_a_node_gets_its_own_gpu(slurm_cluster, tmp_path):
    flags = ["--to=slurm", "--nodes=2", "--gres=gpu:2", "--one_process_per_gpu"]
    done = submit(slurm_cluster, *flags, "--", "launch.env", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    for gpu in (0, 1):
        assert len(re.findall(rf"CUDA_VISIBLE_DEVICES +{gpu}\n", done.stdout)) == 2


MISTAKES = [
    ("--partition=nope", "--partition=nope: Slurm has no such partition; there are: main, urgent."),
    ("--nodes=3", "--nodes=3: more than the partition has or allows"),
    ("--mem=999999G", "--mem=999999G: expected what a node has"),
    ("--gpus_per_node=9", "--nodes=2, --gpus_per_node=9: no such nodes are there"),
    ("--time=soon", "--time=soon: expected a time such as 04:00:00"),
    ("--sbatch_line=--frobnicate", "--sbatch_line=--frobnicate: sbatch has no such option."),
]


@pytest.mark.parametrize(("flag", "message"), MISTAKES)
def test_what_slurm_refuses_ends_with_2_and_names_the_flag(slurm_cluster, tmp_path, flag, message):
    words = ["--", "launch.train", "--config=config.py", f"--workdir={tmp_path / 'work'}"]
    done = submit(slurm_cluster, "--to=slurm", "--nodes=2", flag, *words)

    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr
    assert "work" not in slurm_cluster.run("squeue", "--noheader", "--format=%j")


def test_a_second_job_with_the_workdir_of_a_waiting_one_is_refused(slurm_cluster, tmp_path):
    flags = [*DETACHED, "--sbatch_line=--hold"]
    words = ["--", "launch.train", "--config=config.py", f"--workdir={tmp_path / 'work'}"]
    assert submit(slurm_cluster, *flags, *words).returncode == 0

    again = submit(slurm_cluster, *flags, *words)
    assert again.returncode == 2 and "is PENDING (JobHeldUser); cancel it first" in again.stderr

    assert submit(slurm_cluster, "cancel", f"--workdir={tmp_path / 'work'}").returncode == 0
    assert "CANCELLED" in submit(slurm_cluster, "status", f"--workdir={tmp_path / 'work'}").stdout
