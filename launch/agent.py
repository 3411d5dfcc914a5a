"""Starts this host's processes of a job, watches them, and says how the job ended. One a host; needs no JAX.

    python -m launch.agent --workdir=runs/x --processes=4 -- launch.train --config=... --workdir=runs/x
    python -m launch.agent --workdir=... --hosts=2 --host=0 --rendezvous=node0:8476 -- launch.train ...

SIGTERM or Ctrl-C asks all processes, on all hosts, to save and end; a second one ends them at once. Ends with the
job's code, the same on every host: 0 finished, 1 a bug, 2 bad command line or config, 3 bad data or weights, 4
diverged, 42 stopped with its state saved, 43 a process was lost or hung, 128 and more killed by a signal.
On one host it starts the job again by itself, --max_restarts times; across hosts their scheduler does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

from launch import entry
from launch.attempts import LEASE_INTERVAL, Attempt, Attempts, LeaseLostError
from launch.devices import gpus_of_each_process
from launch.gathering import Place, Plan, check_shared, gather, report_to_first_host
from launch.link import split_address
from launch.log_view import show
from launch.processes import Process
from launch.requests_to_stop import StopRequests
from launch.submission import MODULES
from launch.supervisor import SILENCE, Outcome, Rules, Supervisor, processes_log
from launch.verdict import PEER_LOST, PREEMPTED, Decision, backoff_seconds, decide, is_restartable
from pgdist import files
from pgdist.errors import ConfigError, Preempted, UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; for a command without one, leave it out.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes on this host.", lower_bound=1)
_HOSTS = flags.DEFINE_integer("hosts", 1, "Hosts in the job.", lower_bound=1)
_HOST = flags.DEFINE_integer(
    "host", None, "Which of them this is, from 0; under srun by default what Slurm says.", lower_bound=0
)
_RENDEZVOUS = flags.DEFINE_string("rendezvous", "", "HOST:PORT where the agent of host 0 listens.")
_JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 300, "Seconds to wait for the other hosts.")
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", None, "Simulate so many CPU devices in each process.", lower_bound=1
)
_GPUS = flags.DEFINE_string(
    "gpus", "", "Divide these GPUs of the host among its processes: all, or numbers as in 0,1,2,3."
)
_JOB_ID = flags.DEFINE_string(
    "job_id", "", "What the scheduler calls the job: the same on all hosts and in all attempts."
)
_MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 0, "Failures to start again after.", lower_bound=0)
_BACKOFF = flags.DEFINE_float(
    "backoff",
    5,
    "Seconds before the first restart; doubles with each failure, to at most 300.",
    lower_bound=0,
)
_GRACE = flags.DEFINE_float(
    "grace", 120, "Seconds to save and end in, once asked to; what runs then is killed.", lower_bound=0
)
_SILENCE = flags.DEFINE_list(
    "silence",
    [],
    "Seconds without a sign of life after which a process counts as hung, by what it does: "
    + ",".join(f"{phase}={seconds:g}" for phase, seconds in SILENCE.items()),
)
_RANKS = flags.DEFINE_list("ranks", [], "Processes whose lines are shown; all by default.")
_END_WITH_STDIN = flags.DEFINE_bool(
    "end_with_stdin",
    False,
    "Take the lines `stop` and `kill` from standard input as the first and second signal; at its end, as when "
    "the launcher at the other end is gone, end all.",
)

_SAVES_ITS_STATE = "launch.train"  # the module that has something to save when it is asked to stop


class Agent:
    """The agent of one host, from its flags."""

    def __init__(self, module: str, arguments: list[str], *, scratch: Path) -> None:
        self._module, self._arguments = module, arguments
        self._scratch = scratch
        self._host = _this_host()
        self._hosts = _HOSTS.value
        self._job_id = _JOB_ID.value or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._attempts = Attempts(_WORKDIR.value or str(scratch / "workdir"))
        # Of a bucket, a local copy that is copied back.
        self._log_files = files.open_folder(f"{_WORKDIR.value or scratch / 'workdir'}/logs")
        self._logs = self._log_files.local
        self._rules = Rules(silence=_silence(_SILENCE.value), grace=_GRACE.value)
        self._ranks = _ranks(_RANKS.value)
        self._gpus = gpus_of_each_process(_GPUS.value, processes=_PROCESSES.value)
        self._requests = StopRequests(from_stdin=_END_WITH_STDIN.value)
        self._place = Place(
            host=self._host,
            hosts=self._hosts,
            processes=_PROCESSES.value,
            job_id=self._job_id,
            rendezvous=_RENDEZVOUS.value,
            timeout=_JOIN_TIMEOUT.value,
            was_stopped=lambda: self._requests.total > 0,
            say=self._say,
        )

    def run(self) -> int:
        """Runs the job to its end, again after a failure where that is this agent's affair; its code.

        Raises UserError for what keeps the job from starting.
        """
        if self._attempts.is_cancelled(job_id=self._job_id):
            raise Preempted(f"Job {self._job_id} was cancelled; nothing was started.")
        self._log_files.fetch_file(f"agent_{self._host:03d}.log")
        self._log_files.start()
        try:
            return self._run()
        finally:
            self._try(self._log_files.close)

    def _run(self) -> int:
        while True:
            attempt = self._attempts.claim(job_id=self._job_id) if self._host == 0 else None
            try:
                outcome = self._run_attempt(attempt)
                if self._hosts > 1 or not self._may_try_again(outcome, attempt):
                    return PEER_LOST if self._requests.launcher_is_gone else outcome.code
                decision = decide(
                    workdir=self._attempts.workdir,
                    job_id=self._job_id,
                    code=outcome.code,
                    max_restarts=_MAX_RESTARTS.value,
                )
                self._say(f"code {decision.code}: {decision.reason}")
                if not decision.restart or not self._pause(decision, attempt):
                    return decision.code
            finally:
                if attempt is not None:
                    self._try(attempt.release)

    def _may_try_again(self, outcome: Outcome, attempt: Attempt) -> bool:
        """Whether this agent is the one to start the job again: nobody has asked it to stop, or taken over."""
        return (
            _MAX_RESTARTS.value > 0
            and is_restartable(outcome.code)
            and not self._requests.total
            and self._attempts.numbers()[-1] == attempt.number
        )

    def _run_attempt(self, attempt: Attempt | None) -> Outcome:
        started = time.time()
        try:
            if attempt is not None:
                link, plan = gather(self._place, attempt)
            else:
                link, plan = report_to_first_host(self._place)
        except UserError as error:
            if attempt is not None:
                failed = Outcome(code=error.exit_code, reason=str(error))
                self._try(lambda: self._write_verdict(attempt, failed, started=started, detected=time.time()))
            raise
        attempt = attempt or self._attempts.attempt(plan.attempt)
        with contextlib.closing(link):
            if not _WORKDIR.value:
                attempt.folder.mkdir(parents=True, exist_ok=True)
            elif error := check_shared(self._place, attempt, workdir=_WORKDIR.value, token=plan.token):
                link.send(kind="failing", reason=error, lost=False)
                link.send(kind="ended", codes=[ConfigError.exit_code])
                raise ConfigError(error)
            supervisor = Supervisor(
                self._start(plan, attempt),
                host=self._host,
                hosts=self._hosts,
                attempt=attempt,
                holds_lease=self._host == 0,
                link=link,
                rules=self._rules,
                requests=self._requests,
                ranks=self._ranks,
                say=self._say,
            )
            outcome = supervisor.run()
            self._try(lambda: attempt.write_host(self._host, supervisor.facts()))
            if self._host == 0:
                self._try(
                    lambda: self._write_verdict(
                        attempt, outcome, started=started, detected=supervisor.detected
                    )
                )
            return outcome

    def _start(self, plan: Plan, attempt: Attempt) -> list[Process]:
        self._logs.mkdir(parents=True, exist_ok=True)
        count, first = plan.num_processes, plan.first_process
        self._say(
            f"attempt {attempt.number}: process {first} to {first + _PROCESSES.value - 1} of {count}, "
            f"logs in {self._logs}"
        )
        processes = []
        for local in range(_PROCESSES.value):
            number = first + local
            log = processes_log(self._logs, number)
            self._log_files.fetch_file(log.name)  # of earlier attempts, which it continues
            with log.open("a", encoding="utf-8") as header:
                header.write(f"--- attempt {attempt.number}, job {self._job_id}\n")
            processes.append(
                Process(
                    [sys.executable, "-m", self._module, *self._arguments],
                    number=number,
                    environment=os.environ | self._variables(plan, attempt, number=number, local=local),
                    log=log,
                    heartbeat=self._scratch / f"process_{number}",
                    ignores_stop=self._module == _SAVES_ITS_STATE,
                )
            )
        return processes

    def _variables(self, plan: Plan, attempt: Attempt, *, number: int, local: int) -> dict[str, str]:
        variables = {
            "PGDIST_HEARTBEAT": str(self._scratch / f"process_{number}"),
            "PGDIST_ATTEMPT": f"{attempt.number:03d}",
            "PYTHONUNBUFFERED": "1",
        }
        if plan.num_processes > 1:
            variables["PGDIST_COORDINATOR"] = plan.coordinator
            variables["PGDIST_NUM_PROCESSES"] = str(plan.num_processes)
            variables["PGDIST_PROCESS_ID"] = str(number)
        if _DEVICES.value:
            variables["PGDIST_FAKE_DEVICES"] = str(_DEVICES.value)
        if self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[local])
        if (
            _WORKDIR.value
            and not files.is_url(_WORKDIR.value)
            and "JAX_COMPILATION_CACHE_DIR" not in os.environ
        ):
            # A restart need not compile again, not even what takes less than JAX's second.
            variables["JAX_COMPILATION_CACHE_DIR"] = str(self._attempts.folder.parent / "compilation_cache")
            variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return variables

    def _write_verdict(
        self, attempt: Attempt, outcome: Outcome, *, started: float, detected: float | None
    ) -> None:
        attempt.write_verdict(
            {
                "code": outcome.code,
                "reason": outcome.reason,
                "job_id": self._job_id,
                "started": started,
                "detected": detected,
                "ended": time.time(),
            }
        )

    def _pause(self, decision: Decision, attempt: Attempt) -> bool:
        """Waits, holding the workdir; whether nobody has asked to stop or taken the workdir meanwhile."""
        seconds = 0.0 if decision.code == PREEMPTED else backoff_seconds(_BACKOFF.value, decision.failures)
        end, next_beat = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end and not self._requests.total:
            if time.monotonic() >= next_beat:
                next_beat += LEASE_INTERVAL
                try:
                    attempt.keep()
                except LeaseLostError as error:
                    self._say(f"the workdir was taken over: {error}")
                    return False
                except Exception as error:
                    self._say(f"cannot write into {attempt.folder}: {error}")
            time.sleep(0.05)
        return not self._requests.total

    def _try(self, action: Callable[[], None]) -> None:
        """Does what is no reason to end otherwise than the job has ended."""
        try:
            action()
        except Exception as error:  # a full disk; a bucket, whose errors are many
            self._say(f"at the end: {error}")

    def _say(self, text: str) -> None:
        """On the terminal, and in a log of the agent's own: a detached one has no terminal."""
        name = "agent" if self._hosts == 1 else f"agent {self._host}"
        show(f"pgdist {name}: {text}", sys.stderr)
        with contextlib.suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"agent_{self._host:03d}.log").open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def main(module: str = "", *arguments: str) -> None:
    """Reads the flags and runs the job."""
    if module not in MODULES:
        raise ConfigError(
            f"expected a command after --, one of {', '.join(MODULES)}, as in: python -m launch.agent --workdir=W "
            f"-- launch.train --config=... --workdir=W; found {module!r}"
        )
    if _HOSTS.value > 1:
        entry.require("rendezvous", "job_id")
        split_address(_RENDEZVOUS.value)
    if _this_host() >= _HOSTS.value:
        raise ConfigError(
            f"--host={_this_host()}: expected 0 to {_HOSTS.value - 1} for --hosts={_HOSTS.value}"
        )
    scratch = Path(tempfile.mkdtemp(prefix="pgdist_agent_"))
    try:
        code = Agent(module, list(arguments), scratch=scratch).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(code)


def _this_host() -> int:
    if _HOST.value is not None:
        return _HOST.value
    return int(os.environ["SLURM_NODEID"]) if _HOSTS.value > 1 and "SLURM_STEP_ID" in os.environ else 0


def _silence(given: list[str]) -> dict:
    limits = dict(SILENCE)
    for item in given:
        phase, _, seconds = item.partition("=")
        try:
            if phase not in SILENCE:
                raise ValueError
            limits[phase] = float(seconds)
            if not limits[phase] > 0:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--silence={item}: expected PHASE=SECONDS with one of the phases {', '.join(SILENCE)}"
            ) from None
    return limits


def _ranks(given: list[str]) -> list[int] | None:
    if not all(rank.isdecimal() for rank in given):
        raise ConfigError(f"--ranks={','.join(given)}: expected numbers of processes, as in 0,3")
    return [int(rank) for rank in given] or None


if __name__ == "__main__":
    entry.run(main, name="agent", usage=__doc__, positional="-- COMMAND [flags]")
