"""What `submit --to=slurm` would hand to sbatch, and its mistakes; no Slurm is needed.

The last tests run such a script under bash beside stand-ins for Slurm's commands, to send it signals at moments
that a real Slurm (tests/slurm) does not hit at will.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.targets import slurm_scheduler
from launch.targets.slurm_script import parse_time
from tests.launch.goldens import FOLDER, check_golden

ROOT = Path(__file__).parents[2]
JOB = ("--", "launch.train", "--config=configs/notebook.py", "--workdir=/shared/runs/cows")
SETUP = "--setup=source .venv/bin/activate"


def submit(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """`submit --to=slurm` on a machine where no job is around it; path: where it finds commands."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = outside | {"PYTHONPATH": str(ROOT), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, "-m", "launch.submit", "--to=slurm", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def script(*arguments: str) -> str:
    done = submit("--dry_run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


GOLDENS = {
    "plain": ["--nodes=2", SETUP, *JOB],
    "one_node": ["--cpus_per_task=16", "--max_restarts=3", SETUP, *JOB],
    "gpus": [
        *("--nodes=4", "--gpus_per_node=8", "--one_process_per_gpu", "--cpus_per_task=96", "--mem=0"),
        *("--time=1-00:00:00", "--partition=a100", "--account=vision", "--qos=long"),
        *("--sbatch_line=--exclusive", "--sbatch_line=#SBATCH --mail-type=FAIL", "--name=cows"),
        *("--setup=module load cuda", SETUP, "--silence=stepping=120", *JOB),
    ],
    "container": [
        *("--nodes=2", "--gres=gpu:h100:8", "--processes_per_node=2", "--grace=300"),
        *("--container_image=nvcr.io#nvidia/jax:25.10", "--container_mounts=/shared:/shared,/data:/data:ro"),
        *("--srun_flag=--container-workdir=/shared/pgdist", *JOB),
    ],
    "awkward_names": [
        *("--nodes=2", SETUP, "--", "launch.train", "--config=configs/notebook.py"),
        *('--workdir=/shared/a b;$(touch x) 100%/"q" it\'s', "--config.trainable=(('.*', 1.0),)"),
    ],
    "health_check": ["--nodes=2", SETUP, "--", "launch.env", "--check"],
}


@pytest.mark.parametrize("case", GOLDENS)
def test_the_script_is_the_one_that_a_person_has_looked_at(case):
    check_golden(f"slurm_{case}.txt", script(*GOLDENS[case]).replace(str(ROOT), "/home/me/pgdist"))


@pytest.mark.parametrize("case", GOLDENS)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_has_nothing_to_say(case):
    path = FOLDER / f"slurm_{case}.txt"
    # What users quote is not to be expanded, what they source is not here, and traps are called by nobody.
    command = ["shellcheck", "--exclude=SC2016,SC1091,SC2317,SC2329", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_without_setup_the_agents_run_under_this_python():
    assert f"    {sys.executable} -m launch.agent" in script("--nodes=2", *JOB)
    assert "    /opt/py -m launch.agent" in script("--python=/opt/py", *JOB)


@pytest.mark.parametrize(
    "gpus", ["--gpus_per_node=4", "--gpus_per_node=a100:4", "--gres=gpu:4", "--gres=gpu:a100:4"]
)
def test_one_process_per_gpu_counts_the_gpus(gpus):
    words = script(gpus, "--one_process_per_gpu", *JOB).split()
    assert "--processes=4" in words and "--gpus=all" in words


MISTAKES = [
    (["--one_process_per_gpu"], "expected --gpus_per_node=N or --gres=gpu:N beside it"),
    (["--one_process_per_gpu", "--gpus_per_node=8", "--processes_per_node=2"], "give one of them"),
    (["--time=00:03:00"], "--time=00:03:00: the job would be stopped to save as soon as it runs, 180 s"),
    (["--signal_ahead=60"], "--signal_ahead=60: the time limit would cut off the --grace=120 s"),
    (["--nodes=0"], "--nodes"),
    (["--sbatch_line=exclusive"], "--sbatch_line='exclusive': expected an option of sbatch"),
    (["--partition=a\nscancel 1"], "--partition='a\\nscancel 1': expected one line"),
    (["--in_allocation"], "--in_allocation: this shell is in none; get one with salloc"),
    (["--partitoin=a100"], "unknown flag --partitoin; did you mean --partition?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_ends_with_2_and_names_the_flag(arguments, message):
    done = submit("--dry_run", *arguments, *JOB)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_in_a_container_a_relative_workdir_is_refused():
    done = submit(
        "--dry_run", "--container_image=jax", "--", "launch.train", "--config=c.py", "--workdir=runs/x"
    )
    assert done.returncode == 2
    assert "--workdir=runs/x: with --container_image give an absolute path" in done.stderr


def test_a_folder_that_slurm_cannot_write_its_log_into_is_refused(tmp_path):
    done = submit("--dry_run", "--", "launch.train", "--config=c.py", f"--workdir={tmp_path}/a\\b")
    assert done.returncode == 2
    assert "Slurm writes no log into a folder with a backslash in its name" in done.stderr


def test_a_machine_without_slurm_says_where_to_go_and_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "work"
    done = submit("--", "launch.train", "--config=c.py", f"--workdir={workdir}", path=str(tmp_path))
    assert done.returncode == 2
    assert "no sbatch on this machine: run this on a login node of the Slurm cluster" in done.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("04:00:00", 14400),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("infinite", None),
        ("", None),
    ],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert parse_time(text) == seconds


def test_the_state_of_a_job_is_read_from_what_scontrol_prints():
    line = (
        "JobId=41 JobName=pgdist-x UserId=root(0) Priority=4294901757 JobState=PENDING Reason=BeginTime "
        "Dependency=(null) Requeue=1 Restarts=2 BatchFlag=2 Reboot=0 ExitCode=42:0 ReqNodeList=(null) "
        "ExcNodeList=(null) NodeList= NumNodes=2"
    )
    state = slurm_scheduler.parse_job(line)
    assert (state.describe(), state.code) == ("PENDING (BeginTime), restart 2", 42)
    assert state.is_waiting and not state.has_ended


# Stand-ins. The agents' step is a process that ends with 42 when it is signalled and counts how often it was.
SLURM = {
    "srun": """echo started >>"$STATE/log"; sleep "$STEP_DELAY"; echo $$ >"$STATE/step"
        trap 'echo signalled >>"$STATE/log"; sleep 0.1; exit 42' USR1
        trap 'echo killed >>"$STATE/log"; exit 137' TERM
        for _ in $(seq 200); do sleep 0.05; done; exit 0""",
    "squeue": """case $* in
        *--steps*) echo "7.batch batch"; [ ! -e "$STATE/step" ] || echo "7.0 pgdist-agents" ;;
        *) echo "$JOB_STATE" ;;
        esac""",
    "scontrol": """case $1 in
        listpids) echo "PID JOBID STEPID LOCALID GLOBALID"; echo "$(cat "$STATE/step") 7 0 0 0" ;;
        requeue) echo requeued >>"$STATE/log" ;;
        show) [ "$2" = hostnames ] && echo n1 || echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=x" ;;
        esac""",
    "scancel": """kill -USR1 "$(cat "$STATE/step")" """,
    "python": """case $* in *launch.verdict*) echo "verdict $*" >>"$STATE/log"; echo restart; exit 42 ;; esac""",
}


@pytest.fixture
def run_job(tmp_path) -> Callable[..., tuple[int, list[str]]]:
    """Runs a script, sends it SIGTERM after so many seconds; its code, and what was done in its course."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(stat.S_IRWXU)
    text = script("--nodes=2", "--setup=sleep 0.2", *JOB)
    (tmp_path / "job").write_text(text)

    def run(*, after: float, step_delay: float = 0.0, job: str = "RUNNING") -> tuple[int, list[str]]:
        state = tmp_path / f"state_{random.random()}"
        state.mkdir()
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "2"}
        variables |= {"STATE": str(state), "STEP_DELAY": str(step_delay), "JOB_STATE": job}
        path = f"{commands}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", str(tmp_path / "job")],
            env={**os.environ, **variables, "PATH": path},
            stdout=subprocess.DEVNULL,
        )
        try:
            time.sleep(after)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
        return code, (state / "log").read_text().splitlines()

    return run


@pytest.mark.parametrize("after", [0.1 + 0.02 * number for number in range(12)])
def test_a_signal_at_any_moment_reaches_the_agents_once_or_keeps_them_from_starting(run_job, after):
    code, log = run_job(after=after)
    assert code == 42
    assert log[:-2] in (["started", "signalled"], [])
    assert "--code=42 --max_restarts=10" in log[-2] and log[-1] == "requeued"


def test_a_signal_while_srun_has_no_step_yet_is_kept_for_it(run_job):
    code, log = run_job(after=0.5, step_delay=1.0)
    assert (code, log[:2], log[-1]) == (42, ["started", "signalled"], "requeued")


def test_a_job_that_slurm_ends_already_is_not_put_back(run_job):
    code, log = run_job(after=0.5, job="COMPLETING")
    assert code == 42 and "requeued" not in log
