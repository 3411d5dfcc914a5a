"""One attempt on one host: starts its processes, watches them, and ends all when one of them cannot go on.

A process ends the attempt by dying, by being stopped, or by a silence longer than what it does may take. Then its
peers get a moment to end by themselves, which tells a mistake that all share from the loss of one, and are
killed. What happens here is told to the other hosts' agents, and what happens there is heard.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.attempts import LEASE_INTERVAL, Attempt, LeaseLostError
from launch.link import Link, Message
from launch.log_view import view_logs
from launch.processes import Process
from launch.requests_to_stop import StopRequests
from launch.verdict import PEER_LOST, PERMANENT, PREEMPTED, verdict
from pgdist.heartbeat import Phase

STOPPED_SECONDS = 4.0  # a process may be stopped (SIGSTOP, a debugger) before it counts as lost
# For the peers of one that has failed: more than the two in which they agree on a mistake.
_SETTLE_SECONDS = 3.0
_STACK_SECONDS = 1.0  # to write stacks
_END_SECONDS = 10.0  # for other hosts to report, once all has been told to end
_POLL_SECONDS = 0.1

SILENCE: dict[Phase, float] = {  # seconds, by default
    "starting": 600,  # imports, and waiting for the other processes
    "loading": 3600,  # a checkpoint of 28B from a bucket
    "compiling": 3600,
    "stepping": 600,
    "saving": 1800,
    "evaluating": 1800,  # a batch; the first one compiles
    "finishing": 3600,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How long is waited for what, seconds.  silence: by phase.  grace: from a request to stop."""

    silence: Mapping[Phase, float]
    grace: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the job ended, by the agent's lights."""

    code: int
    reason: str


class Supervisor:
    """The processes of this host in one attempt; `run` returns when the job has ended on all hosts.

    requests: what asks this agent to stop.
    """

    def __init__(
        self,
        processes: list[Process],
        *,
        host: int,
        hosts: int,
        attempt: Attempt,
        holds_lease: bool,
        link: Link,
        rules: Rules,
        requests: StopRequests,
        ranks: list[int] | None,
        say: Callable[[str], None],
    ) -> None:
        self._processes = processes
        self._host, self._hosts = host, hosts
        self._attempt, self._holds_lease = attempt, holds_lease
        self._link = link
        self._rules = rules
        self._requests = requests
        self._say = say
        self._views = view_logs({p.number: (p.log, p.log_start) for p in processes}, ranks=ranks)
        self._reason = ""  # why the attempt ends before it is finished
        self._detected: float | None = None  # when that was seen, seconds since the epoch
        self._deadline: float | None = None  # when what still runs is killed; monotonic
        self._is_stopping = False
        # Everybody may be sent the first request, and each passes it on: only one's own second one counts.
        self._signals_here = 0
        self._judged: set[int] = set()
        self._codes: dict[int, list[int]] = {}  # of the processes of each host that has ended
        self._outcome: Outcome | None = None
        self._started = time.time()
        self._next_report = 0.0

    @property
    def detected(self) -> float | None:
        """When it was seen that the attempt cannot go on, seconds since the epoch."""
        return self._detected

    def run(self) -> Outcome:
        """Watches until the job has ended everywhere, and says how."""
        try:
            while self._outcome is None:
                for process in self._processes:
                    process.look()
                for message in self._link.receive():
                    self._hear(message)
                self._heed_signals()
                self._judge()
                self._end_what_is_late()
                self._show()
                self._report()
                self._conclude()
                time.sleep(_POLL_SECONDS)
        finally:
            self._end_all("the agent ends")
        self._show(to_the_end=True)
        return self._outcome

    def facts(self) -> dict[str, Any]:
        """What attempts/NNN/host_HHH.json says."""
        return {
            "host": socket.gethostname(),
            "agent_pid": os.getpid(),
            "started": self._started,
            "detected": self._detected,
            "reason": self._reason,
            "processes": [
                {
                    "process": process.number,
                    "pid": process.pid,
                    "end": process.describe_end(),
                    "code": process.code,
                    "phase": process.phase,
                    "step": process.beat.step if process.beat else None,
                    "phases_since": process.beats,
                    "log": str(process.log),
                }
                for process in self._processes
            ],
        }

    def _heed_signals(self) -> None:
        if self._requests.launcher_is_gone:
            self._fail("the launcher at the other end of standard input is gone", settle=0.0)
        for _ in range(self._requests.take()):
            self._signals_here += 1
            if self._signals_here > 1:
                self._link.send(kind="kill")
                self._kill("asked a second time to stop")
            else:
                self._link.send(kind="stop")
                self._stop("asked to stop")
        if not self._is_stopping:
            return
        for process in self._processes:
            # Before its first sign of life it has no handler yet.
            if process.code is None and process.beat is not None and not process.is_told_to_stop:
                process.is_told_to_stop = True
                process.ask_to_stop()

    def _hear(self, message: Message) -> None:
        """One message of another agent; the first host passes on to all what concerns all."""
        kind, host = message["kind"], message["host"]
        if self._host == 0 and kind in ("stop", "kill", "failing"):
            self._link.send(**{name: value for name, value in message.items() if name != "host"})
        if kind == "stop":
            self._stop(f"host {host} was asked to stop")
        elif kind == "kill":
            self._kill(f"host {host} was asked a second time to stop")
        elif kind == "failing":
            self._fail(message["reason"], tell=False, lost=message["lost"])
        elif kind == "ended":
            self._codes[host] = message["codes"]
        elif kind == "verdict":
            self._outcome = Outcome(code=message["code"], reason=message["reason"])
        elif kind == "lost":
            if host not in self._codes:
                self._codes[host] = [PEER_LOST]
                self._fail(f"host {host} was lost: {message['why']}")

    def _judge(self) -> None:
        """Looks for processes that have failed, are stopped, or have fallen silent."""
        ended = [p for p in self._processes if p.code is not None and p.number not in self._judged]
        # Of several that have ended at once, the one whose end explains the others' gives the reason.
        for process in sorted(ended, key=lambda p: p.code not in PERMANENT):
            self._judged.add(process.number)
            process.end_children()
            self._judge_end(process)
        for process in self._processes:
            if process.code is not None or self._reason:
                continue
            if process.stopped_since and time.monotonic() - process.stopped_since > STOPPED_SECONDS:
                self._hang(f"process {process.number} is stopped (SIGSTOP), in {process.describe_place()}")
            elif process.silent_seconds() > self._rules.silence[process.phase]:
                self._hang(
                    f"process {process.number} has given no sign of life for "
                    f"{self._rules.silence[process.phase]:g} s, in {process.describe_place()}"
                )

    def _judge_end(self, process: Process) -> None:
        if process.code == PREEMPTED:
            self._end_by(time.monotonic() + self._rules.grace)  # the others are still saving
        elif process.code and not process.was_ended:
            lost = process.code == PEER_LOST or process.code >= 128
            self._fail(
                f"process {process.number} {process.describe_end()}, in {process.describe_place()}", lost=lost
            )

    def _stop(self, why: str) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._say(f"{why}: saves at the next step, then ends, within {self._rules.grace:g} s")
            self._end_by(time.monotonic() + self._rules.grace)

    def _kill(self, why: str) -> None:
        self._say(f"{why}: ends at once")
        self._note(why)
        for process in self._processes:
            process.kill(why="")

    def _fail(
        self, reason: str, *, tell: bool = True, settle: float = _SETTLE_SECONDS, lost: bool = True
    ) -> None:
        """The attempt is over: what still runs gets a moment.

        lost: what the others say from now on is how JAX aborts for want of a peer, pages of it: only logged.
        """
        if self._reason:
            return
        self._show()
        if lost:
            self._views.clear()
        self._note(reason)
        self._say(reason)
        self._end_by(time.monotonic() + settle)
        if tell:
            self._link.send(kind="failing", reason=reason, lost=lost)

    def _hang(self, reason: str) -> None:
        """A process hangs, and with it all that wait for it: their stacks show where."""
        for process in self._processes:
            process.dump_stacks()
        self._fail(f"{reason}; its log has the stacks", settle=_STACK_SECONDS)

    def _note(self, reason: str) -> None:
        if not self._reason:
            self._reason, self._detected = reason, time.time()

    def _end_by(self, deadline: float) -> None:
        self._deadline = min(self._deadline or deadline, deadline)

    def _end_what_is_late(self) -> None:
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        running = [process for process in self._processes if process.code is None]
        if self._reason or not running:
            self._end_all(self._reason)
        elif all(process.phase in ("starting", "loading") for process in running):
            self._note("asked to stop before it had loaded; there was nothing new to save")
            self._end_all(self._reason, meaning=PREEMPTED)
        else:
            for process in running:
                process.dump_stacks()
            self._fail(f"not done {self._rules.grace:g} s after being asked to stop", settle=_STACK_SECONDS)
            self._deadline = time.monotonic() + _STACK_SECONDS

    def _end_all(self, why: str, *, meaning: int = PEER_LOST) -> None:
        for process in self._processes:
            process.kill(why=why, meaning=meaning)
        for process in self._processes:
            process.wait()

    def _conclude(self) -> None:
        """Reports this host's end to the first, and there the job's to all."""
        if any(process.number not in self._judged for process in self._processes):
            return
        if self._host not in self._codes:
            self._codes[self._host] = [process.verdict_code for process in self._processes]
            if self._host != 0:
                self._link.send(kind="ended", codes=self._codes[self._host])
            if self._reason:
                self._deadline = time.monotonic() + _END_SECONDS
        if self._host == 0:
            self._conclude_job()
        elif 0 in self._codes or self._is_late():  # the first host is lost
            self._outcome = self._own_outcome()

    def _conclude_job(self) -> None:
        missing = [host for host in range(self._hosts) if host not in self._codes]
        if missing and not self._is_late():
            return
        self._codes |= {host: [PEER_LOST] for host in missing}
        self._outcome = self._own_outcome()
        self._link.send(kind="verdict", code=self._outcome.code, reason=self._outcome.reason)

    def _own_outcome(self) -> Outcome:
        code = verdict(code for codes in self._codes.values() for code in codes)
        ends = {0: "finished", PREEMPTED: "preempted, state saved"}
        return Outcome(code=code, reason=self._reason or ends.get(code, f"ended with code {code}"))

    def _is_late(self) -> bool:
        return bool(self._reason) and self._deadline is not None and time.monotonic() > self._deadline

    def _show(self, *, to_the_end: bool = False) -> None:
        for view in self._views:
            view.show(sys.stdout, to_the_end=to_the_end)

    def _report(self) -> None:
        """Writes what happens here, and keeps the lease, every few seconds."""
        if time.monotonic() < self._next_report:
            return
        self._next_report = time.monotonic() + LEASE_INTERVAL
        try:
            if self._holds_lease:
                self._attempt.keep()
            self._attempt.write_host(self._host, self.facts())
        except LeaseLostError as error:
            self._fail(f"the workdir was taken over: {error}")
        # A full disk ends no run by itself, nor does a bucket, whose errors are many.
        except Exception as error:
            self._say(f"cannot write into {self._attempt.folder}: {error}")


def processes_log(folder: Path, number: int) -> Path:
    """Where process `number` of the job writes."""
    return folder / f"process_{number:03d}.log"
