"""Jobs on this machine, started as a user would, for tests and measurements that hurt them.

`python -m launch.submit --to=local` runs in a session of its own; leaving the `with` ends all that is left of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from pgdist.heartbeat import VARIABLE, Beat, read_beat
from tests.tiny_runs import ROOT

_MARK = "PGDIST_TEST_JOB"
_POLL = 0.005


class LocalJob:
    """One `submit --to=local`, and the processes of its newest attempt."""

    def __init__(
        self, *flags: str, command: Sequence[str], workdir: Path, shares_programs: bool = True
    ) -> None:
        """shares_programs: use the programs that the tests have compiled, where they have."""
        self.workdir = workdir
        self.mark = uuid.uuid4().hex
        self.output = workdir.with_name(workdir.name + ".out")
        chosen_by_tests = ("XLA_FLAGS",) if shares_programs else ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
        environment = {name: value for name, value in os.environ.items() if name not in chosen_by_tests}
        environment |= {"PYTHONPATH": str(ROOT), _MARK: self.mark}
        # What a job compiles is small, and much: the next job need not do it again.
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with self.output.open("ab") as output:
            self.agent = subprocess.Popen(
                # A test run that is killed leaves no job behind.
                ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", "launch.submit", "--to=local", *flags]
                + ["--", *command],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> LocalJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.kill()
        self.agent.wait()
        for process in self.relatives():
            process.kill()

    def wait(self, *, seconds: float = 200) -> int:
        """The job's code once it has ended."""
        try:
            return self.agent.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s:\n{self.tail()}") from None

    def tail(self) -> str:
        """The end of what the terminal has seen."""
        return self.output.read_text(errors="replace")[-6000:]

    def attempt(self, number: int | None = None) -> Path:
        """The folder of an attempt, of the newest by default."""
        if number is None:
            number = max(int(path.name) for path in self.attempts())
        return self.workdir / "attempts" / f"{number:03d}"

    def attempts(self) -> list[Path]:
        """The folders of all attempts."""
        return [path for path in (self.workdir / "attempts").glob("*") if path.name.isdecimal()]

    def host(self, number: int | None = None) -> dict[str, Any]:
        """What the agent wrote of an attempt's processes; waits for it."""
        return self.until(lambda: json.loads((self.attempt(number) / "host_000.json").read_text()))

    def verdict(self, number: int | None = None) -> dict[str, Any]:
        """How an attempt ended; waits for it."""
        return self.until(lambda: json.loads((self.attempt(number) / "verdict.json").read_text()))

    def pids(self) -> dict[int, int]:
        """{process: its pid} of the newest attempt."""
        return {process["process"]: process["pid"] for process in self.host()["processes"]}

    def send(self, process: int, number: signal.Signals) -> float:
        """Sends a signal to a process; when, seconds since the epoch."""
        os.kill(self.pids()[process], number)
        return time.time()

    def beat(self, process: int) -> Beat | None:
        """The last sign of life of a process."""
        try:
            path = psutil.Process(self.pids()[process]).environ().get(VARIABLE)
        except psutil.Error:
            return None
        return read_beat(Path(path)) if path else None

    def wait_for_beat(
        self, wanted: Callable[[Beat], bool], *, process: int = 0, seconds: float = 120
    ) -> Beat:
        """The first sign of life of a process that is as wanted."""

        def look() -> Beat | None:
            beat = self.beat(process)
            return beat if beat is not None and wanted(beat) else None

        return self.until(look, seconds=seconds)

    def until(self, look: Callable[[], Any], *, seconds: float = 60) -> Any:
        """What `look` finds once it finds something; a file that is not there yet is nothing."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := look():
                    return found
            except (OSError, ValueError):
                pass
            # A detached agent outlives what started it.
            if self.agent.poll() is not None and not self.relatives() and look_fails(look):
                raise AssertionError(f"the job has ended with {self.agent.returncode}:\n{self.tail()}")
            time.sleep(_POLL)
        raise AssertionError(f"not seen within {seconds} s:\n{self.tail()}")

    def relatives(self) -> list[psutil.Process]:
        """All processes that this job has started and that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def orphans(self, *, seconds: float = 5) -> list[psutil.Process]:
        """Those that still run so long after the agent has ended."""
        assert self.agent.poll() is not None
        end = time.monotonic() + seconds
        while (left := self.relatives()) and time.monotonic() < end:
            time.sleep(0.05)
        return left


def look_fails(look: Callable[[], Any]) -> bool:
    """Whether there is nothing to find even now."""
    try:
        return not look()
    except (OSError, ValueError):
        return True


def logged_steps(workdir: Path) -> list[int]:
    """The steps that stand in metrics.jsonl, in their order."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]
