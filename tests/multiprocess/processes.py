"""Several processes of one job on this machine, each with flags and an environment of its own, and how they end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """The processes of a job; leaving the `with` ends what is left of them."""

    def __init__(self, folder: Path, *, count: int, port: int | None = None) -> None:
        """folder: of their logs, which hold standard output and errors."""
        self.address = f"localhost:{port or free_port()}"
        self.count = count
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: dict[int, float] = {}  # by time.monotonic()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def start(
        self, number: int, *command: str, path: Sequence[Path] = (), variables: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts `python COMMAND` as process `number`.  path: comes first on its PYTHONPATH, before ours."""
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])),
            "PGDIST_COORDINATOR": self.address,
            "PGDIST_NUM_PROCESSES": str(self.count),
            "PGDIST_PROCESS_ID": str(number),
            "PGDIST_FAKE_DEVICES": "2",
            **(variables or {}),
        }
        with self._log(number).open("wb") as log:
            self._processes[number] = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                cwd=self._folder,  # `python -m` finds first what lies in it
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._processes[number]

    def codes(self, *, seconds: float = 90) -> list[int]:
        """The exit codes once all have ended, in their order; fails the test after `seconds`."""
        end = time.monotonic() + seconds
        while running := [number for number, p in self._processes.items() if p.poll() is None]:
            if time.monotonic() > end:
                pytest.fail(f"{running} run on after {seconds} s:\n{self.tails()}")
            time.sleep(0.02)
            for number, process in self._processes.items():
                if number not in self.ended and process.poll() is not None:
                    self.ended[number] = time.monotonic()
        return [process.returncode for _, process in sorted(self._processes.items())]

    def output(self, number: int) -> str:
        """What a process has printed so far."""
        return self._log(number).read_text(errors="replace")

    def tails(self) -> str:
        """The end of all they have printed."""
        return "\n".join(f"--- process {number}\n{self.output(number)[-3000:]}" for number in self._processes)

    def wait_for(self, text: str, *, numbers: Sequence[int], seconds: float = 60) -> None:
        """Returns when these processes have printed the text."""
        end = time.monotonic() + seconds
        while not all(text in self.output(number) for number in numbers):
            assert time.monotonic() < end, self.tails()
            time.sleep(0.05)

    def _log(self, number: int) -> Path:
        return self._folder / f"process_{number}.log"
