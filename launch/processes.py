"""One process that an agent started: its log, its signs of life, and how it ended.

It writes straight into its log file, so that nothing it says is lost and nothing it does waits for the agent;
the agent reads the file. It has a session of its own, which keeps the terminal's Ctrl-C from it, and the kernel
ends it when the agent dies, however that happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.verdict import PEER_LOST
from pgdist.heartbeat import Beat, Phase, read_beat

STACKS_SIGNAL = signal.SIGUSR1  # `launch.entry` makes every command print its stacks at it

_POLL_SECONDS = 0.01
_SECONDS_TO_DIE = 10.0
_KILLED = 128 + signal.SIGKILL
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Process:
    """Process `number` of the job, started at once.

    ignores_stop: whether SIGTERM and SIGINT are nothing to it until it has handlers of its own: a scheduler
    that sends them to everybody must not end one that is still importing.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        number: int,
        environment: Mapping[str, str],
        log: Path,
        heartbeat: Path,
        ignores_stop: bool,
    ) -> None:
        self.number = number
        self.log = log
        self.log_start = log.stat().st_size if log.exists() else 0
        self.code: int | None = None
        self.was_ended = ""  # why the agent has ended it
        self._meaning = PEER_LOST
        self.beat: Beat | None = None
        self.beats: dict[Phase, float] = {}  # when each phase was first seen, seconds since the epoch
        self.is_told_to_stop = False
        self.stopped_since: float | None = None  # by SIGSTOP; monotonic
        self._heartbeat = heartbeat
        self._last_sign = time.monotonic()
        heartbeat.unlink(missing_ok=True)
        agent = os.getpid()

        def prepare() -> None:
            if _LIBC is not None:
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != agent:  # it died in between
                    os._exit(128 + signal.SIGKILL)
            if ignores_stop:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)

        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.pid = self._process.pid

    def look(self) -> None:
        """Brings `code`, `stopped_since` and `beat` up to date."""
        if self.code is not None:
            return
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid and os.WIFSTOPPED(status):
            self.stopped_since = time.monotonic()
        elif pid and os.WIFCONTINUED(status):
            self.stopped_since = None
        elif pid:
            code = os.waitstatus_to_exitcode(status)
            self.code = self._process.returncode = code if code >= 0 else 128 - code
        beat = read_beat(self._heartbeat)
        if beat is not None and beat != self.beat:
            self.beat = beat
            self.beats.setdefault(beat.phase, beat.time)
            self._last_sign = time.monotonic()

    @property
    def phase(self) -> Phase:
        """What it does; starting before its first sign of life."""
        return self.beat.phase if self.beat is not None else "starting"

    def silent_seconds(self) -> float:
        """Since its last sign of life."""
        return time.monotonic() - self._last_sign

    def signal(self, number: signal.Signals) -> None:
        """Sends it, and nothing where the process has ended."""
        if self.code is None:
            os.kill(self.pid, number)  # not yet waited for, so the number is still its own

    def ask_to_stop(self) -> None:
        """Asks it to save and end."""
        self.signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Makes it write the stacks of its threads into its log, if it still can."""
        self.signal(STACKS_SIGNAL)
        self.signal(signal.SIGCONT)  # one that was stopped takes no signals

    def kill(self, *, why: str, meaning: int = PEER_LOST) -> None:
        """Ends it and what it has started; its end is then the agent's doing.

        why: "" where its own end by SIGKILL is to count.  meaning: the code that counts instead.
        """
        if self.code is not None:
            return
        self.was_ended, self._meaning = self.was_ended or why, meaning
        self._end_group()

    def wait(self) -> None:
        """Waits for the end of one that was killed; not for ever: in a system call that hangs nothing ends it."""
        end = time.monotonic() + _SECONDS_TO_DIE
        while self.code is None and time.monotonic() < end:
            self.look()
            time.sleep(_POLL_SECONDS)
        if self.code is None:
            self.code = self._process.returncode = _KILLED
            self.was_ended += ", which it has not heeded: it hangs in the kernel"

    def end_children(self) -> None:
        """Ends what an ended process has left behind."""
        self._end_group()

    def _end_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # none are left, as Linux and macOS say it
            pass

    @property
    def verdict_code(self) -> int:
        """What its end means for the job: one that the agent ended was lost with the one that failed."""
        assert self.code is not None
        return self._meaning if self.was_ended and self.code == _KILLED else self.code

    def describe_place(self) -> str:
        """What it did last, for people: "stepping after step 12"."""
        known = self.beat is not None and self.beat.step >= 0
        return f"{self.phase} after step {self.beat.step}" if known else self.phase

    def describe_end(self) -> str:
        """How it ended, for people."""
        if self.code is None:
            return "running"
        if self.was_ended and self.code == _KILLED:
            return f"ended by its agent: {self.was_ended}"
        if self.code >= 128 and self.code - 128 in signal.valid_signals():
            return f"killed by {signal.Signals(self.code - 128).name}"
        return f"ended with code {self.code}"
