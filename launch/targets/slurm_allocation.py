"""A job inside an allocation that is there already (salloc, or a batch script of one's own): srun, here and now.

There is no scheduler to put it back into the queue, so it is started again here, after a pause.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

from launch import attached
from launch.submission import Submission
from launch.targets import slurm_scheduler as slurm
from launch.targets.slurm_script import FIRST_PORT, PORTS, Resources, agent_words, srun_words
from launch.verdict import PREEMPTED, decide

_LONGEST_PAUSE = 300.0  # seconds
_STARTING = 5.0  # seconds that srun takes to start its tasks; a signal before that is lost
_POLL = 0.2


def node_count() -> int:
    """Nodes in the allocation that this process is in; 0 in none."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or 0)


def has_gpus() -> bool:
    """Whether the allocation has GPUs."""
    names = ("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS")
    return any(os.environ.get(name) for name in names)


def step_of(job_id: str) -> str:
    """What Slurm calls the step that runs the agents of a job."""
    return f"pgdist-{job_id}"


def command(submission: Submission, resources: Resources, *, job_id: str) -> list[str]:
    """The srun that runs the job on the first nodes of the allocation."""
    nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])[: resources.nodes]
    port = FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS
    return [
        *srun_words(resources, step=step_of(job_id)),
        f"--nodes={resources.nodes}",
        f"--nodelist={','.join(nodes)}",
        "--overlap",  # the shell of salloc may be a step itself, on the same cores
        "--input=none",
        *agent_words(
            submission,
            resources,
            hosts=str(resources.nodes),
            rendezvous=f"{slurm.address(nodes[0])}:{port}",
            job_id=job_id,
        ),
    ]


def describe(submission: Submission, resources: Resources) -> str:
    """What `run` would run."""
    return shlex.join(command(submission, resources, job_id=_new_job_id())) + "\n"


def run(submission: Submission, resources: Resources) -> int:
    """Runs the job, again after failures as far as its budget goes; its code.  Ctrl-C asks it to save and end."""
    slurm.require_command("srun")
    job_id = _new_job_id()
    submission.record(target="slurm", job_id=job_id, allocation=os.environ["SLURM_JOB_ID"])
    while True:
        attempt = _Attempt(submission, resources, job_id=job_id)
        code = attempt.run()
        if not submission.workdir:
            return code
        decision = decide(
            workdir=submission.workdir, job_id=job_id, code=code, max_restarts=submission.max_restarts
        )
        print(f"pgdist: code {decision.code}: {decision.reason}", file=sys.stderr)
        if not decision.restart or attempt.was_asked_to_stop or not _is_allocated():
            return decision.code
        if decision.code != PREEMPTED:
            time.sleep(min(_LONGEST_PAUSE, submission.backoff * 2 ** (decision.failures - 1)))


class _Attempt:
    """One srun."""

    def __init__(self, submission: Submission, resources: Resources, *, job_id: str) -> None:
        self._step = step_of(job_id)
        self._command = command(submission, resources, job_id=job_id)
        self._is_signal_due = False
        self.was_asked_to_stop = False

    def run(self) -> int:
        """Its code; 128 and the signal's number where srun was killed."""
        # A session of its own: at Ctrl-C srun would kill what it runs.
        self._earliest_signal = time.monotonic() + _STARTING
        self._srun = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
        attached.watch(
            is_running=self._is_running, show=lambda: None, stop=self._stop, kill=self._kill, interval=_POLL
        )
        code = self._srun.wait()
        return code if code >= 0 else 128 - code

    def _is_running(self) -> bool:
        if self._is_signal_due and time.monotonic() > self._earliest_signal:
            self._is_signal_due = not slurm.signal_step(os.environ["SLURM_JOB_ID"], self._step, "TERM")
        return self._srun.poll() is None

    def _stop(self) -> None:
        self.was_asked_to_stop = self._is_signal_due = True

    def _kill(self) -> None:
        self._srun.terminate()  # which makes it kill its tasks


def _new_job_id() -> str:
    """For the agents: an allocation can run many jobs, one after the other."""
    return f"{os.environ['SLURM_JOB_ID']}-{time.strftime('%Y%m%dT%H%M%S')}"


def _is_allocated() -> bool:
    now = slurm.state(os.environ["SLURM_JOB_ID"])
    return now is None or now.word == "RUNNING"
