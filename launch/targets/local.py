"""This machine: N processes under one agent, each with its share of simulated CPU devices or of the GPUs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from launch.attempts import Attempts, is_this_machine
from launch.job_status import follow_logs, is_running
from launch.submission import Submission
from pgdist.errors import ConfigError

_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes on this machine.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", None, "Simulate so many CPU devices in each process.", lower_bound=1
)
_GPUS = flags.DEFINE_string(
    "gpus", "", "Divide these GPUs among the processes: all, or numbers as in 0,1,2,3."
)
_RANKS = flags.DEFINE_string("ranks", "", "Processes whose lines are shown, as in 0,3; all by default.")

_SECONDS_TO_FAIL = 2.0  # in which an agent notices what is wrong with its flags


def dry_run(submission: Submission) -> str:
    """The agent's command line."""
    return shlex.join(_command(submission, python="python")) + "\n"


def start(submission: Submission) -> int:
    """Becomes the agent, which restarts the job by itself; with --detach leaves it behind."""
    command = _command(submission, python=sys.executable)
    sys.stdout.flush()
    if not submission.detach:
        submission.record(target="local")
        os.execv(sys.executable, command)
    if not submission.workdir:
        raise ConfigError("--detach needs a command with a --workdir, where its output goes")
    submission.record(target="local")
    with tempfile.TemporaryFile() as said:  # until it has begun; then its log says more
        agent = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = agent.wait(timeout=_SECONDS_TO_FAIL)
        except subprocess.TimeoutExpired:
            pass
        else:
            said.seek(0)
            print(said.read().decode(errors="replace"), end="", file=sys.stderr)
            return code
    print(f"pgdist: agent {agent.pid} runs the job; submit status, logs and cancel tell and end it")
    return 0


def status(record: dict[str, Any]) -> str:
    """Nothing that the attempts do not say."""
    del record
    return ""


def logs(record: dict[str, Any], *, follow: bool) -> None:
    """Prints the logs of all processes."""
    follow_logs(record["workdir"], follow=follow)


def cancel(record: dict[str, Any]) -> None:
    """Asks the agent to save and end.  ConfigError where none runs here."""
    newest = Attempts(record["workdir"]).newest()
    lease = newest.lease() if newest else {}
    if not is_running(record["workdir"]):
        raise ConfigError(f"--workdir={record['workdir']}: no job runs in it")
    if not is_this_machine(lease):
        raise ConfigError(f"the job runs on {lease['host']}, or in a container there; cancel it there")
    os.kill(lease["pid"], signal.SIGTERM)
    print(f"pgdist: asked agent {lease['pid']} to save and end; `cancel` once more ends it at once")


def _command(submission: Submission, *, python: str) -> list[str]:
    own = [f"--processes={_PROCESSES.value}"]
    own += [f"--devices_per_process={_DEVICES.value}"] if _DEVICES.value else []
    own += [f"--gpus={_GPUS.value}"] if _GPUS.value else []
    own += [f"--ranks={_RANKS.value}"] if _RANKS.value else []
    own += [f"--max_restarts={submission.max_restarts}", f"--backoff={submission.backoff:g}"]
    return submission.agent_command(*own, python=python)
