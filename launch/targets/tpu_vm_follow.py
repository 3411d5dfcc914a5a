"""Staying with a job on a TPU VM: prints worker 0's log through one long ssh, and finds out how the job ended.

Connections break in days of training. The log is read on from the byte that was printed last.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from launch.targets.tpu_vm_commands import Job, Tpu
from launch.verdict import PEER_LOST

_RETRY_SECONDS = 10.0  # between two connections
_ANSWER_SECONDS = 120.0  # gcloud itself tries to connect for about 50

# States of a TPU VM that has been taken away or is no more.
_GONE = ("PREEMPTED", "TERMINATED", "STOPPING", "STOPPED", "DELETING")


class Follower:
    """Looks at one job, as `attached.watch` asks it to; leaving the `with` ends the connection."""

    def __init__(self, tpu: Tpu, job: Job) -> None:
        self._tpu, self._job = tpu, job
        self._printed = 0  # bytes of the log
        self._log: subprocess.Popen[bytes] | None = None
        self._next_connection = 0.0  # monotonic
        self.code: int | None = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    def is_running(self) -> bool:
        """False once the job has ended and its log is printed; connects again where the connection was lost."""
        if self._log is not None and self._log.poll() is None:
            return True
        self.show()
        self._disconnect()
        if time.monotonic() < self._next_connection:
            return True
        self._next_connection = time.monotonic() + _RETRY_SECONDS
        code = self._ask_code()
        if code is None:
            self._connect()
            return True
        last = _run(self._tpu.ssh(self._job.log(skip=self._printed), worker="0"))
        if last.returncode == 0:
            print(last.stdout, end="", flush=True)
        self.code = code
        return False

    def show(self) -> None:
        """Prints what has come."""
        if self._log is None or self._log.stdout is None:
            return
        while chunk := self._log.stdout.read(2**16):  # not blocking: None when there is nothing yet
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            self._printed += len(chunk)

    def _ask_code(self) -> int | None:
        """The job's code; None while it runs, or nothing can be found out."""
        done = _run(self._tpu.ssh(self._job.ask("code"), worker="0"))
        if done.returncode == 0:
            return int(done.stdout) if done.stdout.strip().isdecimal() else None
        tpu = _run(self._tpu.describe())
        if tpu.stdout.strip() in _GONE or (tpu.returncode != 0 and "NOT_FOUND" in tpu.stderr):
            print(
                f"pgdist: the TPU {self._tpu.name} is gone: {tpu.stdout.strip() or 'deleted'}",
                file=sys.stderr,
            )
            return PEER_LOST
        print(f"pgdist: warning: {done.stderr.strip()[-300:]}; still trying", file=sys.stderr)
        return None

    def _connect(self) -> None:
        self._log = subprocess.Popen(
            self._tpu.ssh(self._job.log(skip=self._printed, follow=True), worker="0"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # gcloud says for each connection that it connects
            start_new_session=True,  # Ctrl-C is for the job
            bufsize=0,
        )
        assert self._log.stdout is not None
        os.set_blocking(self._log.stdout.fileno(), False)

    def _disconnect(self) -> None:
        if self._log is not None:
            self._log.terminate()
            self._log.wait()
            assert self._log.stdout is not None
            self._log.stdout.close()
            self._log = None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Asks gcloud something; a code of 124 where it does not answer."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "gcloud did not answer")
