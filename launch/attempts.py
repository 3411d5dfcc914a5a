"""The attempts of a job, as files in its workdir: who holds it, how each process ended, whether to try again.

    attempts/000/claimed.json     made by the one who runs this attempt
    attempts/000/lease.json       who runs this attempt; rewritten every few seconds while it lives
    attempts/000/token.json       written by the first host, read by all: they do share the folder
    attempts/000/host_000.json    what each process of a host does, and how it ended
    attempts/000/verdict.json     how the job ended, in one code
    attempts/restarts.json        failures and preemptions of the job so far
    attempts/cancelled.json       a job that is not to be started again

An attempt is claimed by making its claimed.json, which one claimant alone can do; a lease that is no longer
rewritten belongs to nobody. Needs no JAX; the workdir may be a URL that etils.epath opens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from etils import epath

from pgdist import files
from pgdist.errors import ConfigError

LEASE_INTERVAL = 2.0  # seconds between two beats
LEASE_SECONDS = 15.0  # without a beat before a lease on another machine is over

_Record = dict[str, Any]


class LeaseLostError(Exception):
    """Another job, or a later attempt of this one, has taken the workdir."""


class Attempts:
    """The attempts in one workdir."""

    def __init__(self, workdir: str) -> None:
        self.workdir = workdir
        self.folder = files.folder(workdir) / "attempts"

    def numbers(self) -> list[int]:
        """Of all attempts, ascending."""
        try:
            return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def attempt(self, number: int) -> Attempt:
        """The attempt of that number, whoever's."""
        return Attempt(self.folder / f"{number:03d}", number)

    def newest(self) -> Attempt | None:
        """The last attempt, whoever's."""
        numbers = self.numbers()
        return self.attempt(numbers[-1]) if numbers else None

    def claim(self, *, job_id: str) -> Attempt:
        """Begins the next attempt and takes its lease.  ConfigError where a live other job holds one."""
        while True:
            last = self.newest()
            if last is not None and (holder := last.wait_for_lease()):
                if holder["job_id"] != job_id and not holder["ended"] and last.is_alive(holder):
                    raise ConfigError(
                        f"--workdir={self.workdir} is in use: job {holder['job_id']} (process {holder['pid']} "
                        f"on {holder['host']}) runs in it. Wait for its end, cancel it, or use a new --workdir."
                    )
            attempt = self.attempt(last.number + 1 if last else 0)
            try:
                attempt.folder.mkdir(parents=True, exist_ok=True)
                # In a bucket folders are there as soon as something is in them: only a file can be claimed.
                if not files.create_text(attempt.folder / "claimed.json", json.dumps(_identity())):
                    continue  # somebody was faster: look again who
            except OSError as error:
                raise ConfigError(
                    f"--workdir={self.workdir}: expected a folder that can be made and written, found: "
                    f"{error.strerror or error}. Name another one."
                ) from error
            attempt.take(job_id)
            return attempt

    def count_restart(self, *, job_id: str, failed: bool) -> int:
        """Notes one more failure, or else one more preemption, of the job; returns its failures so far."""
        counts = self._counts(job_id)
        counts["failures" if failed else "preemptions"] += 1
        counts["last_attempt"] = max(self.numbers(), default=-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "restarts.json", counts)
        return counts["failures"]

    def is_new(self, attempt: Attempt, *, job_id: str) -> bool:
        """Whether `count_restart` has not been called since the attempt began."""
        return attempt.number > self._counts(job_id)["last_attempt"]

    def _counts(self, job_id: str) -> _Record:
        counts = read_json(self.folder / "restarts.json")
        if counts.get("job_id") != job_id:
            counts = {"job_id": job_id, "failures": 0, "preemptions": 0, "last_attempt": -1}
        return counts

    def cancel(self, *, job_id: str) -> None:
        """Marks the job as one that is not to be started again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "cancelled.json", {"job_id": job_id})

    def is_cancelled(self, *, job_id: str) -> bool:
        """Whether `cancel` has marked this very job."""
        return read_json(self.folder / "cancelled.json").get("job_id") == job_id


@dataclasses.dataclass
class Attempt:
    """One attempt: its folder, its number, and for the agent that claimed it, its lease."""

    folder: epath.Path
    number: int
    _lease: _Record = dataclasses.field(default_factory=dict)

    def take(self, job_id: str) -> None:
        """Writes the first beat of the lease, and the token that all hosts must read."""
        self._lease = {"job_id": job_id, "attempt": self.number, "beat": 0, "ended": False, **_identity()}
        write_json(self.folder / "lease.json", self._lease)
        write_json(self.folder / "token.json", {"token": secrets.token_hex(16)})

    def keep(self) -> None:
        """One more beat.  LeaseLostError where a later attempt has begun: this one must end."""
        if (self.folder.parent / f"{self.number + 1:03d}").exists():
            raise LeaseLostError(f"attempt {self.number + 1} has begun elsewhere")
        self._lease["beat"] += 1
        write_json(self.folder / "lease.json", self._lease)

    def release(self) -> None:
        """Says that the attempt has ended."""
        self._lease["ended"] = True
        write_json(self.folder / "lease.json", self._lease)

    @property
    def token(self) -> str:
        """What the first host wrote; "" where that cannot be read."""
        return read_json(self.folder / "token.json").get("token", "")

    def write_host(self, host: int, facts: _Record) -> None:
        """What the processes of a host do."""
        write_json(self.folder / f"host_{host:03d}.json", facts)

    def hosts(self) -> list[_Record]:
        """What `write_host` wrote, in the order of the hosts."""
        return [read_json(path) for path in sorted(self.folder.glob("host_*.json"))]

    def write_verdict(self, facts: _Record) -> None:
        """How the job ended."""
        write_json(self.folder / "verdict.json", facts)

    def verdict(self) -> _Record:
        """What `write_verdict` wrote; {} before that."""
        return read_json(self.folder / "verdict.json")

    def lease(self) -> _Record:
        """The last beat of whoever holds the attempt; {} where there is none."""
        return read_json(self.folder / "lease.json")

    def wait_for_lease(self) -> _Record:
        """`lease`, after a moment where the folder was made only now."""
        end = time.monotonic() + LEASE_INTERVAL
        while not (lease := self.lease()) and time.monotonic() < end:
            time.sleep(0.1)
        return lease

    def is_alive(self, holder: _Record) -> bool:
        """Whether the holder of the lease still runs; elsewhere, whether it beats while we watch."""
        if is_this_machine(holder):
            return holder["pid"] != os.getpid() and start_time(holder["pid"]) == holder["started"]
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            if (now := self.lease()).get("ended"):
                return False
            if now.get("beat", holder["beat"]) != holder["beat"]:
                return True
            time.sleep(0.5)
        return False


def read_json(path: epath.Path) -> _Record:
    """The object in the file; {} where there is none, or half of one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: epath.Path, value: _Record) -> None:
    """Replaces the file as a whole."""
    files.write_text(path, json.dumps(value, indent=2) + "\n")


def is_this_machine(holder: _Record) -> bool:
    """Whether the process ids of a lease's holder are those of here."""
    here = _identity()
    return all(holder.get(name) == here[name] for name in ("host", "boot", "namespace"))


def _identity() -> _Record:
    """Which process this is, of which boot of which machine; containers have process ids of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": boot,
        "namespace": namespace,
        "pid": pid,
        "started": start_time(pid),
    }


def start_time(pid: int) -> str:
    """When a process began, in whatever way this system tells it; "" where there is none (a zombie is none)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        if os.path.exists("/proc/self"):
            return ""
    asked = subprocess.run(["ps", "-p", str(pid), "-o", "lstart="], capture_output=True, text=True)
    return asked.stdout.strip()
