"""`submit --to=ssh` on two machines of one process each, behind a real sshd."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.ssh.machines import ADDRESSES, Machines, SshJob, submit
from tests.tiny_runs import ROOT, assert_same_bits, losses, tiny_config, write_config, write_inputs

pytestmark = [pytest.mark.ssh, pytest.mark.timeout(300)]

STEPS = 20
# A checkpoint at each step makes steps slow enough for something to happen between.
SLOW = "--config.checkpoint.every=1"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    config = tiny_config(inputs, **{"mesh.data": 2, "export": True})
    return write_config(tmp_path_factory.mktemp("config") / "config.py", config)


def training(machines: Machines, config: Path, workdir: Path, *flags: str) -> SshJob:
    command = ["launch.train", f"--config={config}", f"--workdir={workdir}", *flags]
    return SshJob(machines, command=command, log=workdir.with_name(f"{workdir.name}.out"))


def exported(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "model.npz") as file:
        return {name: file[name] for name in file.files}


def attempt_codes(workdir: Path) -> list[int]:
    folders = sorted(path for path in (workdir / "attempts").iterdir() if path.name.isdecimal())
    return [json.loads((folder / "verdict.json").read_text())["code"] for folder in folders]


def has_step(workdir: Path, step: int) -> bool:
    metrics = workdir / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


@pytest.fixture(scope="module")
def undisturbed(machines, config_file, tmp_path_factory) -> Iterator[Path]:
    """The workdir of a run from beginning to end; its name means something to a shell."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "a b;$(touch x)"
    with training(machines, config_file, workdir) as job:
        assert job.wait() == 0, job.output()
    return workdir


def test_two_machines_train_to_the_end(undisturbed, machines):
    output = undisturbed.with_name(f"{undisturbed.name}.out").read_text()

    for number, address in enumerate(ADDRESSES):
        assert f"{address}:{machines.port}: pgdist agent {number}: attempt 0: process {number}" in output
    assert "pgdist: the job has ended with code 0" in output
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    assert attempt_codes(undisturbed) == [0]
    assert not (ROOT / "x").exists()
    assert not machines.processes()


def test_a_job_that_is_stopped_saves_and_the_next_start_ends_bitwise_like_an_undisturbed_run(
    undisturbed, machines, config_file, tmp_path
):
    workdir = tmp_path / "stopped"
    with training(machines, config_file, workdir, SLOW) as job:
        job.until(lambda: has_step(workdir, 2))
        job.launcher.send_signal(signal.SIGTERM)
        assert job.wait(seconds=60) == 42, job.output()
    assert 2 <= max(losses(workdir)) < STEPS

    with training(machines, config_file, workdir) as job:
        assert job.wait() == 0, job.output()

    assert attempt_codes(workdir) == [42, 0]
    assert losses(workdir) == losses(undisturbed)
    assert_same_bits(exported(workdir), exported(undisturbed))


def test_a_killed_process_and_a_cut_connection_are_each_survived_by_a_restart(
    undisturbed, machines, config_file, tmp_path
):
    workdir = tmp_path / "survivor"
    with training(machines, config_file, workdir, SLOW) as job:
        job.until(lambda: has_step(workdir, 2))
        machines.training()[0].kill()
        job.until(lambda: "starting again in 0.5 s" in job.output())
        job.until(lambda: has_step(workdir, 6) and len(machines.training()) == 2)
        cut_a_connection(job)
        assert job.wait() == 0, job.output()

    first, second, last = attempt_codes(workdir)
    assert (first in (137, 43), second, last) == (True, 43, 0)
    assert "the connection or its agent was lost" in job.output()
    assert losses(workdir) == losses(undisturbed)
    assert_same_bits(exported(workdir), exported(undisturbed))


def cut_a_connection(job: SshJob) -> None:
    """Ends the ssh to the second machine, as a broken network would."""
    ends = [child for child in psutil.Process(job.launcher.pid).children() if ADDRESSES[1] in child.cmdline()]
    ends[0].kill()


def test_a_killed_launcher_leaves_no_process_behind(machines, config_file, tmp_path):
    workdir = tmp_path / "orphans"
    with training(machines, config_file, workdir, SLOW) as job:
        job.until(lambda: has_step(workdir, 2))
        assert len(machines.training()) == 2
        job.launcher.kill()
        job.launcher.wait()
        assert job.nothing_is_left(seconds=15), machines.processes()


def test_another_terminal_sees_and_cancels_the_job_and_a_second_request_ends_it_at_once(
    machines, config_file, tmp_path
):
    workdir = tmp_path / "impatient"
    with training(machines, config_file, workdir, SLOW, "--config.steps=100000") as job:
        job.until(lambda: has_step(workdir, 2))
        status = submit("status", f"--workdir={workdir}")
        assert f"launcher: process {job.launcher.pid}\n" in status.stdout, status
        assert "attempt 0: running" in status.stdout
        assert "Joined the job" in submit("logs", f"--workdir={workdir}").stdout
        cancelled = submit("cancel", f"--workdir={workdir}")
        assert cancelled.returncode == 0, cancelled
        job.until(lambda: "asked the job to save and end" in job.output())
        job.launcher.send_signal(signal.SIGINT)
        assert job.wait(seconds=20) in (42, 43, 137), job.output()
    assert "which has ended" in submit("status", f"--workdir={workdir}").stdout


def test_code_that_was_shipped_runs_on_both_machines(machines, tmp_path):
    if not (ROOT / ".git").exists() and not os.environ.get("CI"):
        pytest.skip("not a git checkout: nothing says what to ship")
    flags = ["--ship", f"--remote_dir={tmp_path}/shipped here"]
    with SshJob(machines, *flags, command=["launch.env"], log=tmp_path / "out") as job:
        assert job.wait(seconds=60) == 0, job.output()

    (folder,) = (tmp_path / "shipped here").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["host_000", "host_001"]
    assert (folder / "host_001" / "launch" / "agent.py").exists()
    assert not (folder / "host_001" / ".venv").exists()
    assert f"code sent to {folder}/host_001" in job.output()


MISTAKES = {
    "wrong key": (
        ["--identity={machines.folder}/wrong_key"],
        "127.0.0.2:{machines.port}: cannot connect: .*Permission denied .publickey.*It must work without a question",
    ),
    "unknown host key": (
        ["--ssh_option=UserKnownHostsFile=/dev/null"],
        "127.0.0.1:{machines.port}: cannot connect: .*Host key verification failed",
    ),
    "no folder": (
        ["--remote_dir=/no/such folder"],
        "127.0.0.1:{machines.port}: no folder /no/such folder there",
    ),
    "no Python": (
        ["--remote_python=.no/python"],
        "no .no/python there; say where it is with --remote_python",
    ),
    "broken setup": (["--setup=source /no/activate"], "--setup=source /no/activate failed: .*No such file"),
    "detached": (["--detach"], "--detach does not go with --to=ssh"),
    "no host file": (["--host_file=/no/hosts.txt"], "cannot read the host file /no/hosts.txt"),
    "no identity": (["--identity=/no/key"], "--identity=/no/key: expected a file that can be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_starts(mistake, machines, tmp_path):
    flags, message = MISTAKES[mistake]
    flags = [flag.format(machines=machines) for flag in flags]
    workdir = tmp_path / "work"
    with SshJob(
        machines, *flags, command=["launch.train", f"--workdir={workdir}"], log=tmp_path / "out"
    ) as job:
        assert job.wait(seconds=60) == 2, job.output()

    assert re.search(message.format(machines=machines), job.output()), job.output()
    assert "Traceback" not in job.output()
    assert not workdir.exists()


def test_machines_where_no_sshd_listens_are_all_named(machines, tmp_path):
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("127.0.0.1:1\n127.0.0.2:1\n")
    with SshJob(machines, f"--host_file={hosts}", command=["launch.env"], log=tmp_path / "out") as job:
        assert job.wait(seconds=60) == 2, job.output()

    for address in ADDRESSES:
        assert f"{address}:1: cannot connect: ssh: connect to host {address} port 1: Conn" in job.output()


def test_other_code_on_one_machine_is_refused(machines, tmp_path):
    for package in ("launch", "pgdist"):
        shutil.copytree(ROOT / package, tmp_path / "old" / package)
    (tmp_path / "old" / "pgdist" / "errors.py").write_text("# of last week\n")
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"127.0.0.1:{machines.port}\n127.0.0.2:{machines.port} dir='{tmp_path}/old'\n")
    with SshJob(machines, f"--host_file={hosts}", command=["launch.env"], log=tmp_path / "out") as job:
        assert job.wait(seconds=60) == 2, job.output()

    assert f"127.0.0.2:{machines.port}: the pgdist in {tmp_path}/old is not the one" in job.output()
    assert f"127.0.0.1:{machines.port}: the" not in job.output()
