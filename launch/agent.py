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
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import flags

from launch import entry
from launch.attempts import LEASE_INTERVAL, Attempt, Attempts
from launch.devices import gpus_of_each_process
from launch.link import AgentLink, NoLink, connect, listen, split_address
from launch.processes import Process
from launch.supervisor import SILENCE, Outcome, Rules, Supervisor, processes_log
from launch.verdict import PEER_LOST, PREEMPTED, decide
from pgdist import files
from pgdist.errors import ConfigError, PeerLostError, Preempted, UserError

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAVES_ITS_STATE = "launch.train"  # the module that has something to save when it is asked to stop
_MODULES = (_SAVES_ITS_STATE, "launch.predict", "launch.env")
_LONGEST_BACKOFF = 300.0
_STOPPED_EARLY = "Asked to stop before all hosts had come; nothing was started."
_TOKEN_SECONDS = 60.0  # until another host must see the first one's file; NFS may cache a missing one for 30


class _Requests:
    """Signals, and lines of a launcher, that ask to stop."""

    def __init__(self) -> None:
        self._new = 0
        self.total = 0
        self.launcher_is_gone = False
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: self._add())
        if _END_WITH_STDIN.value:
            threading.Thread(target=self._read, daemon=True, name="launcher").start()

    def take(self) -> int:
        """Those since the last call."""
        new, self._new = self._new, 0
        return new

    def _add(self, count: int = 1) -> None:
        self._new += count
        self.total += count

    def _read(self) -> None:
        for line in sys.stdin:
            if line.strip() in ("stop", "kill"):
                self._add(1 if line.strip() == "stop" else 2)
        self.launcher_is_gone = True
        self._add(2)


class Agent:
    """The agent of one host, from its flags."""

    def __init__(self, module: str, arguments: list[str], *, scratch: Path) -> None:
        self._module, self._arguments = module, arguments
        self._scratch = scratch
        self._host = _this_host()
        self._hosts = _HOSTS.value
        self._job_id = _JOB_ID.value or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._attempts = Attempts(_WORKDIR.value or str(scratch / "workdir"))
        self._log_files = files.open_folder(
            f"{_WORKDIR.value or scratch / 'workdir'}/logs"
        )  # a copy of a bucket's
        self._logs = self._log_files.local
        self._rules = Rules(silence=_silence(_SILENCE.value), grace=_GRACE.value)
        self._ranks = [int(rank) for rank in _RANKS.value] if _RANKS.value else None
        self._gpus = gpus_of_each_process(_GPUS.value, processes=_PROCESSES.value)
        self._requests = _Requests()

    def run(self) -> int:
        """Runs the job to its end, again after a failure where that is this agent's affair; its code."""
        self._log_files.fetch_file(f"agent_{self._host:03d}.log")
        self._log_files.start()
        with contextlib.closing(self._log_files):
            return self._run()

    def _run(self) -> int:
        while True:
            attempt = self._attempts.claim(job_id=self._job_id) if self._host == 0 else None
            started = time.time()
            try:
                try:
                    outcome = self._run_attempt(attempt)
                except UserError as error:  # before any process was started
                    if attempt is not None:
                        failed = Outcome(code=error.exit_code, reason=str(error))
                        self._write_verdict(attempt, failed, started=started, detected=time.time())
                    raise
                if self._hosts > 1 or self._requests.total or not self._may_try_again(outcome):
                    return PEER_LOST if self._requests.launcher_is_gone else outcome.code
                decision = decide(
                    workdir=self._attempts.workdir,
                    job_id=self._job_id,
                    code=outcome.code,
                    max_restarts=_MAX_RESTARTS.value,
                )
                self._say(f"code {decision.code}: {decision.reason}")
                if not decision.restart:
                    return decision.code
                failed = outcome.code != PREEMPTED
                seconds = (
                    min(_LONGEST_BACKOFF, _BACKOFF.value * 2 ** (decision.failures - 1)) if failed else 0.0
                )
                if not self._pause(seconds, attempt):
                    return outcome.code
            finally:
                if attempt is not None:
                    attempt.release()

    def _may_try_again(self, outcome: Outcome) -> bool:
        return bool(_MAX_RESTARTS.value) and (outcome.code in (PREEMPTED, PEER_LOST) or outcome.code >= 128)

    def _run_attempt(self, attempt: Attempt | None) -> Outcome:
        started = time.time()
        if attempt is not None:
            link, plan = self._gather(attempt)
        else:
            link, plan = self._report_to_first_host()
            attempt = self._attempts.attempt(plan["attempt"])
        try:
            if error := self._check_shared(attempt, plan["token"]):
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
                signals=self._requests.take,
                ranks=self._ranks,
                say=self._say,
            )
            outcome = supervisor.run()
            attempt.write_host(self._host, supervisor.facts())
            if self._host == 0:
                self._write_verdict(attempt, outcome, started=started, detected=supervisor.detected)
            return outcome
        finally:
            link.close()

    def _gather(self, attempt: Attempt) -> tuple[AgentLink | NoLink, dict]:
        """On the first host: waits for the others' agents and tells them what to start."""
        if self._hosts == 1:
            port = _free_port("127.0.0.1")
            return NoLink(), {
                "attempt": attempt.number,
                "token": attempt.token,
                "first_process": 0,
                "num_processes": _PROCESSES.value,
                "coordinator": f"127.0.0.1:{port}",
            }
        link, hellos = listen(
            _RENDEZVOUS.value,
            hosts=self._hosts,
            job_id=self._job_id,
            timeout=_JOIN_TIMEOUT.value,
            say=self._say,
            gave_up=lambda: self._requests.total > 0,
        )
        if self._requests.total:
            raise Preempted(_STOPPED_EARLY)
        counts = [_PROCESSES.value, *(hellos[host]["processes"] for host in range(1, self._hosts))]
        address, _ = split_address(_RENDEZVOUS.value)
        plan = {
            "attempt": attempt.number,
            "token": attempt.token,
            "num_processes": sum(counts),
            # Another port than the agents', and a new one for each attempt: the last one may still be closing.
            "coordinator": f"{f'[{address}]' if ':' in address else address}:{_free_port('')}",
        }
        for host in range(1, self._hosts):
            link.send_to(host, kind="start", first_process=sum(counts[:host]), **plan)
        return link, plan | {"first_process": 0}

    def _report_to_first_host(self) -> tuple[AgentLink, dict]:
        """On another host: waits for what the first one says."""
        hello = {
            "host": self._host,
            "name": socket.gethostname(),
            "processes": _PROCESSES.value,
            "job_id": self._job_id,
        }
        try:
            link = connect(
                _RENDEZVOUS.value,
                hello=hello,
                timeout=_JOIN_TIMEOUT.value,
                say=self._say,
                gave_up=lambda: self._requests.total > 0,
            )
        except PeerLostError as error:
            raise (Preempted(_STOPPED_EARLY) if self._requests.total else error) from error
        end = time.monotonic() + _JOIN_TIMEOUT.value
        while time.monotonic() < end and not self._requests.total:
            for message in link.receive():
                if message["kind"] == "start":
                    return link, message
                if message["kind"] == "refused":
                    raise ConfigError(f"host 0 refused this one: {message['why']}")
                if message["kind"] == "given_up":
                    raise PeerLostError(f"host 0 has given up: {message['why']}")
                if message["kind"] == "lost":
                    raise PeerLostError(f"host 0 was lost before it started the job: {message['why']}")
            time.sleep(0.05)
        if self._requests.total:
            raise Preempted(_STOPPED_EARLY)
        raise PeerLostError(f"host 0 did not start the job within {_JOIN_TIMEOUT.value:g} s")

    def _check_shared(self, attempt: Attempt, token: str) -> str:
        """What is wrong where this host does not see the first one's workdir; "" where it does."""
        if not _WORKDIR.value:
            attempt.folder.mkdir(parents=True, exist_ok=True)
            return ""
        end = time.monotonic() + min(_TOKEN_SECONDS, _JOIN_TIMEOUT.value)
        while attempt.token != token:
            if time.monotonic() > end:
                return (
                    f"host {self._host} ({socket.gethostname()}) does not see in --workdir={_WORKDIR.value} what "
                    "host 0 has written there: it must lie on a filesystem that all hosts share, under one path"
                )
            if not files.is_url(_WORKDIR.value):
                os.listdir(os.path.dirname(os.path.expanduser(_WORKDIR.value)) or ".")  # makes NFS look again
            time.sleep(0.2)
        return ""

    def _start(self, plan: dict, attempt: Attempt) -> list[Process]:
        self._logs.mkdir(parents=True, exist_ok=True)
        count, first = plan["num_processes"], plan["first_process"]
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

    def _variables(self, plan: dict, attempt: Attempt, *, number: int, local: int) -> dict[str, str]:
        variables = {
            "PGDIST_HEARTBEAT": str(self._scratch / f"process_{number}"),
            "PGDIST_ATTEMPT": f"{attempt.number:03d}",
            "PYTHONUNBUFFERED": "1",
        }
        if plan["num_processes"] > 1:
            variables["PGDIST_COORDINATOR"] = plan["coordinator"]
            variables["PGDIST_NUM_PROCESSES"] = str(plan["num_processes"])
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

    def _pause(self, seconds: float, attempt: Attempt) -> bool:
        """Waits, holding the workdir; whether it was not asked to stop meanwhile."""
        end, next_beat = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end and not self._requests.total:
            if time.monotonic() >= next_beat:
                attempt.keep()
                next_beat += LEASE_INTERVAL
            time.sleep(0.05)
        return not self._requests.total

    def _say(self, text: str) -> None:
        """On the terminal, and in a log of the agent's own: a detached one has no terminal."""
        name = "agent" if self._hosts == 1 else f"agent {self._host}"
        print(f"pgdist {name}: {text}", file=sys.stderr, flush=True)
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"agent_{self._host:03d}.log").open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError:
            pass  # the terminal has it


def main(module: str = "", *arguments: str) -> None:
    """Reads the flags and runs the job."""
    if module not in _MODULES:
        raise ConfigError(
            f"expected a command after --, one of {', '.join(_MODULES)}, as in: python -m launch.agent --workdir=W "
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
        except ValueError:
            raise ConfigError(
                f"--silence={item}: expected PHASE=SECONDS with one of the phases {', '.join(SILENCE)}"
            ) from None
    return limits


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    entry.run(main, name="agent", usage=__doc__, positional="-- COMMAND [flags]")
