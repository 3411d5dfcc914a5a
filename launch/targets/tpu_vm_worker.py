"""What runs on each worker of a TPU VM: starts this worker's agent, and starts it again for as long as that helps.

    python -m launch.targets.tpu_vm_worker --folder=F --max_restarts=10 -- AGENT'S FLAGS -- launch.train ...
    python -m launch.targets.tpu_vm_worker --folder=F --ask=status

There is no scheduler on a TPU VM. All agents of a job end with the same code, so every worker comes to the same
decision by itself. In the folder, one a job, stand `pid` while the job runs and `exit_code` when it has ended. Needs
no JAX.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from absl import flags

from launch import entry
from launch.verdict import PEER_LOST, PREEMPTED, backoff_seconds
from pgdist.errors import ConfigError

QUESTIONS = ("status", "code", "stop", "kill")

_MODULE = "launch.targets.tpu_vm_worker"
_METADATA_SECONDS = 10.0


class Worker:
    """One worker's part of the job."""

    def __init__(self, folder: Path, *, max_restarts: int, backoff: float) -> None:
        self._folder = folder
        self._max_restarts, self._backoff = max_restarts, backoff
        self._agent: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self, command: list[str]) -> int:
        """Runs the agent to the job's end; returns the job's code."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if (pid := running_pid(self._folder)) is not None:
            raise ConfigError(f"this job runs already on this worker, as process {pid}: cancel it first")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self._pass_on())
        (self._folder / "exit_code").unlink(missing_ok=True)
        (self._folder / "pid").write_text(str(os.getpid()))
        code = self._run_until_it_ends(command)
        (self._folder / "exit_code").write_text(str(code))
        (self._folder / "pid").unlink()
        return code

    def _run_until_it_ends(self, command: list[str]) -> int:
        failures = 0
        while True:
            self._agent = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            if self._stopping:  # asked to between the look at it and the start
                self._agent.terminate()
            code = self._agent.wait()
            code = code if code >= 0 else 128 - code
            self._agent = None
            failed = code == PEER_LOST or code >= 128
            failures += failed
            if self._stopping or not (failed or code == PREEMPTED) or failures > self._max_restarts:
                return code
            pause = backoff_seconds(self._backoff, failures) if failed else 0.0
            _say(f"code {code}: starting again in {pause:g} s ({failures} of {self._max_restarts} failures)")
            end = time.monotonic() + pause
            while time.monotonic() < end and not self._stopping:
                time.sleep(0.1)
            if self._stopping:
                return code

    def _pass_on(self) -> None:
        self._stopping = True
        if self._agent is not None:
            self._agent.terminate()


def running_pid(folder: Path) -> int | None:
    """The process that runs the job here, None where there is none."""
    try:
        pid = int((folder / "pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if _MODULE.encode() in words else None  # and no later process of that number


def answer(question: str, folder: Path, *, worker: str) -> str:
    """What to print: `status` a line, `code` the job's exit code or "" before its end, the others what they did."""
    pid = running_pid(folder)
    try:
        code = (folder / "exit_code").read_text() if pid is None else ""
    except FileNotFoundError:
        code = ""
    if question == "code":
        return code
    if question == "status":
        ended = f"ended with code {code}" if code else "no job, or one that was killed"
        return f"worker {worker}: {ended if pid is None else f'running as process {pid}'}"
    if pid is None:
        return f"worker {worker}: no job is running"
    os.kill(pid, signal.SIGTERM)
    if question == "kill":  # a second request ends the agents' processes at once
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
    return f"worker {worker}: asked process {pid} to {'end' if question == 'kill' else 'save and end'}"


def worker_addresses() -> list[str]:
    """The internal addresses of all workers in their order."""
    text = os.environ.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    return [endpoint.split(":")[-1] for endpoint in text.split(",")]  # name:id:address, or the address alone


def worker_number() -> int:
    """Which of them this is."""
    return int(os.environ.get("TPU_WORKER_ID") or _metadata("agent-worker-number"))


def _metadata(name: str) -> str:
    """An attribute of this VM, from Google's metadata server."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # No proxy: the server answers this very machine alone.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as reply:
            return reply.read().decode().strip()
    except (urllib.error.URLError, TimeoutError) as error:
        raise ConfigError(
            f"cannot ask {url}: {getattr(error, 'reason', error)}. Is this a TPU VM? Elsewhere, TPU_WORKER_ID and "
            "TPU_WORKER_HOSTNAMES say which worker this is and where all are"
        ) from error


def _say(text: str) -> None:
    print(f"pgdist worker: {text}", file=sys.stderr, flush=True)


def main(*words: str) -> None:
    """Answers a question, or runs the job."""
    folder = Path(os.path.expanduser(_FOLDER.value)).resolve()
    if _ASK.value:
        worker = os.environ.get("TPU_WORKER_ID") or os.uname().nodename.rpartition("-")[2]
        print(answer(_ASK.value, folder, worker=worker))
        return
    if not words:
        raise ConfigError("give the agent's flags and its command after --")
    addresses, number = worker_addresses(), worker_number()
    here = [f"--hosts={len(addresses)}", f"--host={number}"]
    here += [f"--rendezvous={addresses[0]}:{_PORT.value}"] if len(addresses) > 1 else []
    _say(f"worker {number} of {len(addresses)}")
    worker = Worker(folder, max_restarts=_MAX_RESTARTS.value, backoff=_BACKOFF.value)
    sys.exit(worker.run([sys.executable, "-m", "launch.agent", *here, *words]))


if __name__ == "__main__":
    _FOLDER = flags.DEFINE_string("folder", "~/.pgdist/job", "Folder of the job on this worker.")
    _ASK = flags.DEFINE_enum("ask", None, QUESTIONS, "Ask this of the job, or of it this.")
    _PORT = flags.DEFINE_integer("port", 8490, "Where worker 0's agent listens.", 1, 65535)
    _MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 10, "Failures to start again after.", lower_bound=0)
    _BACKOFF = flags.DEFINE_float("backoff", 5, "Seconds before the first restart; doubles.", lower_bound=0)
    entry.run(main, name="targets.tpu_vm_worker", usage=__doc__, positional="-- AGENT'S FLAGS -- COMMAND")
