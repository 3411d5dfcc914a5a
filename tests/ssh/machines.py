"""Two machines that ssh reaches: 127.0.0.1 and 127.0.0.2, behind an sshd of our own, and jobs on them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.tiny_runs import ROOT

ADDRESSES = ("127.0.0.1", "127.0.0.2")
_MARK = "PGDIST_TEST_MACHINES"


class Machines:
    """An sshd with keys, port and folder of its own; what it starts is marked in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.port = _free_port()
        for name in ("host_key", "key", "wrong_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        known = "".join(f"[{address}]:{self.port} {host_key}\n" for address in ADDRESSES)
        (folder / "known_hosts").write_text(known)
        self.config = folder / "ssh_config"
        self.config.write_text(
            f"Host *\n  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
            f"  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
        )
        (folder / "sshd_config").write_text("\n".join(self._settings()) + "\n")
        self._log = folder / "sshd.log"
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd gives up its rights
        self._sshd = self._start()

    def _settings(self) -> list[str]:
        # What users have from a cluster's login, and what makes tests find the processes and compile once.
        variables = [f"{_MARK}={self.mark}"]
        names = ("PGDIST_TEST_RUN", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
        names += ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",)
        variables += [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        return [
            *(f"ListenAddress {address}:{self.port}" for address in ADDRESSES),
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {self.folder}/authorized_keys",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",  # the folder of the tests may be writable by others
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "SetEnv " + " ".join(variables),
        ]

    def _start(self) -> subprocess.Popen[bytes]:
        sshd = shutil.which("sshd") or "/usr/sbin/sshd"  # it wants its full path
        process = subprocess.Popen(
            [sshd, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self._log)],
            stdin=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        while not all(_answers(address, self.port) for address in ADDRESSES):
            assert process.poll() is None and time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)
        return process

    def close(self) -> None:
        """Ends sshd, and all that still runs on the machines."""
        self._sshd.kill()
        self._sshd.wait()
        for process in self.processes():
            process.kill()

    def host_file(self, *keys: str, port: int | None = None) -> Path:
        """Both machines, each with its keys."""
        path = self.folder / "hosts.txt"
        lines = [f"{address}:{port or self.port}" for address in ADDRESSES]
        keys = (*keys, "", "")
        path.write_text("".join(f"{line} {key}\n" for line, key in zip(lines, keys, strict=False)))
        return path

    def processes(self) -> list[psutil.Process]:
        """What runs on the machines."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def training(self) -> list[psutil.Process]:
        """The training processes among them."""
        found = []
        for process in self.processes():
            try:
                if process.cmdline()[1:3] == ["-m", "launch.train"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found


class SshJob:
    """One `submit --to=ssh`; leaving the `with` kills the launcher."""

    def __init__(self, machines: Machines, *flags: str, command: Sequence[str], log: Path) -> None:
        self.machines = machines
        self.log = log
        own = [f"--host_file={machines.host_file()}", "-F", str(machines.config)]
        own += [f"--identity={machines.folder}/key", f"--remote_python={sys.executable}"]
        own += [f"--port={_free_port()}", "--devices_per_process=2", "--backoff=0.5"]
        with log.open("ab") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "launch.submit", "--to=ssh", *own, *flags, "--", *command],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> SshJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.launcher.kill()
        self.launcher.wait()
        self.nothing_is_left(seconds=20)

    def wait(self, *, seconds: float = 200) -> int:
        """The launcher's code."""
        try:
            return self.launcher.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done after {seconds} s:\n{self.output()}") from None

    def output(self) -> str:
        """What the terminal has seen."""
        return self.log.read_text(errors="replace")

    def until(self, look: Callable[[], object], *, seconds: float = 120) -> None:
        """Returns when `look` is true."""
        end = time.monotonic() + seconds
        while not look():
            assert time.monotonic() < end and self.launcher.poll() is None, self.output()
            time.sleep(0.02)

    def nothing_is_left(self, *, seconds: float) -> bool:
        """Whether no process is left on the machines, within so many seconds."""
        end = time.monotonic() + seconds
        while self.machines.processes() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.machines.processes()


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`launch.submit` from another terminal."""
    command = [sys.executable, "-m", "launch.submit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
