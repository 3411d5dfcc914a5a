"""Stays with a batch job of Slurm: what its log gets, and what becomes of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.targets import slurm_scheduler as slurm

INTERVAL = 2.0  # seconds between two looks into the log
_STATE_INTERVAL = 6.0  # and between two questions to Slurm, which has other users
_BLOCK = 2**16  # bytes


class Tail:
    """What a file gets; it need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def show(self) -> bool:
        """Prints what is new; whether there is a file."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._position)
                while block := log.read(_BLOCK):
                    self._position += len(block)
                    sys.stdout.buffer.write(block)
        except FileNotFoundError:
            return False
        sys.stdout.flush()
        return True


class Follower:
    """A job and its log."""

    def __init__(self, job_id: str, log: Path) -> None:
        self._job_id = job_id
        self._tail = Tail(log)
        self._told = ""
        self._next_question = 0.0
        self.state = slurm.State(word="PENDING")

    def is_running(self) -> bool:
        """Whether the job may still do something; says on standard error what it waits for."""
        if time.monotonic() >= self._next_question:
            self._next_question = time.monotonic() + _STATE_INTERVAL
            state = slurm.state(self._job_id)
            self.state = state or self.state  # where Slurm does not answer, nothing has changed
            self._tell()
        return not self.state.has_ended

    def show(self) -> None:
        """Prints what is new in the log."""
        self._tail.show()

    def follow(self) -> None:
        """Prints the log until the job has ended."""
        while self.is_running():
            self.show()
            time.sleep(INTERVAL)
        self.show()

    def _tell(self) -> None:
        text = f"job {self._job_id} is {self.state.describe()}"
        if text != self._told:
            self._told = text
            print(f"pgdist: {text}", file=sys.stderr, flush=True)
