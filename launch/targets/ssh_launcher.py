"""Keeps a job running on machines that have no scheduler: this launcher is it.

On every machine one agent runs at the end of an ssh. What the launcher says comes to its standard input:
`stop` (save and end), `kill`, and every few seconds a sign of life, without which the agent ends all that it
started. What the agent prints comes back and is shown with the machine's name before it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from launch.attempts import Attempts
from launch.submission import Submission
from launch.targets.host_file import Host
from launch.targets.ssh_connection import LIFE_EVERY, LOST, SIGN_OF_LIFE, Ssh
from launch.verdict import FINISHED, PEER_LOST, PREEMPTED, Decision, backoff_seconds, decide, verdict

# Agents end together. One that has not joined the others yet would wait for minutes; not so long.
_SECONDS_TOGETHER = 15.0
_SECONDS_TO_DIE = 10.0


class Launcher:
    """Starts the job again and again, until it has ended for good.

    scripts: what runs on each host.  facts: what `Submission.record` is to note.  show: takes a line for the
    terminal, from several threads.
    """

    def __init__(
        self,
        *,
        submission: Submission,
        job_id: str,
        ssh: Ssh,
        hosts: Sequence[Host],
        scripts: Sequence[str],
        facts: Mapping[str, Any],
        show: Callable[[str], None],
    ) -> None:
        self._submission = submission
        self._job_id = job_id
        self._ssh = ssh
        self._hosts = hosts
        self._scripts = scripts
        self._facts = facts
        self._show = show
        self._failures = 0
        self._sees_workdir = False
        self._stopping = threading.Event()
        self._beginning = threading.Lock()
        self._attempt: Attempt | None = None

    def run(self) -> int:
        """The job's code, once it has ended for good or was stopped."""
        code = PREEMPTED  # of a job that was stopped before it began
        while attempt := self._begin():
            code = self._code(attempt.wait(meanwhile=self._look_for_workdir))
            if self._stopping.is_set():
                break
            decision = self._decide(code)
            code = decision.code
            if not decision.restart:
                self._show(f"pgdist: the job has ended with code {code}: {decision.reason}")
                break
            pause = backoff_seconds(self._submission.backoff, max(decision.failures, 1))
            self._show(f"pgdist: {decision.reason}; starting again in {pause:g} s")
            self._stopping.wait(pause)
        return code

    def stop(self) -> None:
        """Lets all processes save and end; the job is not started again."""
        self._tell("stop", first_only=True)  # its agent tells the others, for which a second one means kill

    def kill(self) -> None:
        """Ends all processes at once; connections too, where they do not end by themselves."""
        self._tell("kill")
        timer = threading.Timer(_SECONDS_TO_DIE, self.abandon)
        timer.daemon = True
        timer.start()

    def abandon(self) -> None:
        """Ends all connections, at which the agents end all that they started."""
        with self._beginning:
            self._stopping.set()
            if self._attempt is not None:
                self._attempt.disconnect()

    def _begin(self) -> Attempt | None:
        """The next attempt; None for a job that was stopped."""
        with self._beginning:  # none begins unseen by `stop`
            if self._stopping.is_set():
                return None
            self._attempt = Attempt(self._ssh, self._hosts, self._scripts, self._show)
            return self._attempt

    def _tell(self, word: str, *, first_only: bool = False) -> None:
        with self._beginning:
            self._stopping.set()
            if self._attempt is not None:
                self._attempt.say(word, first_only=first_only)

    def _code(self, codes: Sequence[int]) -> int:
        for host, code in zip(self._hosts, codes, strict=True):
            if code == LOST:
                self._show(f"pgdist: {host}: the connection or its agent was lost")
        return verdict(PEER_LOST if code == LOST else code for code in codes)

    def _look_for_workdir(self) -> None:
        """Notes in the workdir what runs in it, once our own lease there shows that it is the hosts' own.

        A folder of that name on this machine may be another one, and must not be made if it is.
        """
        if self._sees_workdir or not self._submission.workdir:
            return
        with contextlib.suppress(Exception):  # whatever a bucket's client raises: the job does not need it
            newest = Attempts(self._submission.workdir).newest()
            if newest is not None and newest.lease().get("job_id") == self._job_id:
                self._submission.record(target="ssh", job_id=self._job_id, **self._facts)
                self._sees_workdir = True

    def _decide(self, code: int) -> Decision:
        """What `launch.verdict` decides; where the workdir is not to be seen, the same by our own count.

        Ours limits the other as well: where an attempt ends before an agent has claimed the workdir, what is
        found there is the verdict of the one before.
        """
        most = self._submission.max_restarts
        may_restart = code in (PREEMPTED, PEER_LOST) or code >= 128
        self._failures += may_restart and code != PREEMPTED
        if self._sees_workdir and self._failures <= most:
            with contextlib.suppress(OSError):  # a full disk must not end the job
                decision = decide(
                    workdir=self._submission.workdir, job_id=self._job_id, code=code, max_restarts=most
                )
                if may_restart or decision.code == code:
                    return decision
        reason = "finished" if code == FINISHED else f"ended with code {code}"
        if self._failures > most:
            may_restart = False
            reason += f"; given up after {most} restarts"
        return Decision(restart=may_restart, code=code, failures=self._failures, reason=reason)


class Attempt:
    """One attempt: an agent on every host, each at the end of a connection."""

    def __init__(
        self, ssh: Ssh, hosts: Sequence[Host], scripts: Sequence[str], show: Callable[[str], None]
    ) -> None:
        self._show = show
        self._speaking = threading.Lock()
        self._ended = threading.Event()
        self._readers: list[threading.Thread] = []
        self._connections: list[subprocess.Popen[bytes]] = []
        for host, script in zip(hosts, scripts, strict=True):
            connection = subprocess.Popen(
                ssh.command(host, "bash", "-s"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the launcher, which tells the agents
            )
            self._connections.append(connection)
            self._say(connection, script)
            self._read(connection.stdout, f"{host}: ")
            self._read(connection.stderr, f"{host}: ssh: ")
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def say(self, word: str, *, first_only: bool = False) -> None:
        """Sends a line to every agent, or to the first, that is still connected."""
        for connection in self._connections[: 1 if first_only else None]:
            if connection.poll() is None:
                self._say(connection, word + "\n")

    def wait(self, *, meanwhile: Callable[[], None]) -> list[int]:
        """The codes of all hosts' ssh, once all have ended.

        Where one has ended and others have not after a while, those are ended.  meanwhile: is called every
        few seconds, and at the end.
        """
        next_call = 0.0
        deadlines: list[tuple[float, Callable[[], None]]] | None = None
        while running := [connection for connection in self._connections if connection.poll() is None]:
            now = time.monotonic()
            if now >= next_call:
                meanwhile()
                next_call = now + LIFE_EVERY
            if deadlines is None and len(running) < len(self._connections):
                late = now + _SECONDS_TOGETHER
                deadlines = [(late, lambda: self.say("kill")), (late + _SECONDS_TO_DIE, self.disconnect)]
            while deadlines and now > deadlines[0][0]:
                deadlines.pop(0)[1]()
            time.sleep(0.1)
        self._ended.set()
        for reader in self._readers:
            reader.join()
        for connection in self._connections:
            connection.stdin.close()
        meanwhile()
        # An ssh that was killed has no code, and is as good as one that lost its connection.
        return [
            LOST if connection.returncode < 0 else connection.returncode for connection in self._connections
        ]

    def disconnect(self) -> None:
        """Ends every connection."""
        for connection in self._connections:
            connection.kill()

    def _keep_alive(self) -> None:
        while not self._ended.wait(LIFE_EVERY):
            self.say(SIGN_OF_LIFE)

    def _say(self, connection: subprocess.Popen[bytes], text: str) -> None:
        assert connection.stdin is not None
        rest = text.encode()
        with self._speaking, contextlib.suppress(OSError):  # it has ended
            while rest:
                rest = rest[os.write(connection.stdin.fileno(), rest) :]

    def _read(self, stream: IO[bytes] | None, prefix: str) -> None:
        assert stream is not None

        def read() -> None:
            for line in stream:
                self._show(prefix + line.decode(errors="replace").rstrip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        self._readers.append(reader)
