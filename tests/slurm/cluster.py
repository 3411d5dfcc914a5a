"""A Slurm cluster of two nodes on this machine, for tests: real daemons in a folder of their own, on free ports.

They run in the foreground as our children, so that ending them takes no search. The cluster is made quick where
real ones are patient: a job that is requeued waits for `cred_expire`, two minutes by default.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

_SECONDS_TO_START = 30.0
_LIBC = ctypes.CDLL(None)

_CONFIG = """
ClusterName=pgdist
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=15
FirstJobId={first_job}
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

_GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # Slurm asks for no more than device files


def missing_programs() -> list[str]:
    """What would have to be installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]


class Cluster:
    """Running daemons; `close` ends them and whatever they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._config = folder / "slurm.conf"
        user = getpass.getuser()
        self._config.write_text(
            _CONFIG.format(
                host=socket.gethostname(),
                user=user,
                folder=folder,
                ports=_three_ports(),
                first_job=random.randrange(1000, 12000),  # the agents' port depends on it
            )
        )
        (folder / "gres.conf").write_text(_GPUS)
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def environment(self) -> dict[str, str]:
        """The variables of a shell on this cluster's login node, where no job of another cluster is."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**ours, "PATH": SEARCH_PATH, "SLURM_CONF": str(self._config)}

    def run(self, *command: str, seconds: float = 30) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Ends all jobs, then the daemons, and waits for each."""
        if self._daemons and self._daemons[-1].poll() is None:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.environment(), timeout=30)
        for process in self._processes_of_jobs():
            process.kill()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        self._daemon(
            "munged", "--foreground", *(f"--{name}={self.folder / file}" for name, file in files.items())
        )
        self._wait_until((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-f", str(self._config))
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-f", str(self._config), "-N", node)
        self._wait_until(self._is_up)

    def _daemon(self, *command: str) -> None:
        # Without what marks our processes: these outlive a test, and the jobs' processes do not inherit from them.
        variables = {name: self.environment()[name] for name in ("PATH", "SLURM_CONF")}
        with (self.folder / f"{len(self._daemons)}-{command[0]}.out").open("wb") as output:
            program = shutil.which(command[0], path=SEARCH_PATH)
            self._daemons.append(
                subprocess.Popen(
                    [str(program), *command[1:]],
                    env=variables,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_end_with_parent,  # a test run that is killed leaves no cluster behind
                )
            )

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _SECONDS_TO_START
        while not condition():
            assert time.monotonic() < end, f"no cluster within {_SECONDS_TO_START} s:\n{self._logs()}"
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"{dead} ended:\n{self._logs()}"
            time.sleep(0.1)

    def _is_up(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=30,
        )
        return "idle 2" in done.stdout

    def _logs(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def _processes_of_jobs(self) -> list[psutil.Process]:
        """Slurm's own for each step, which leave the daemons' family, and all that runs in a job."""
        ours = {daemon.pid for daemon in self._daemons}
        return [
            process for process in psutil.process_iter() if process.pid not in ours and self._owns(process)
        ]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            variables: Mapping[str, str] = process.environ()
        except (psutil.Error, OSError):
            return False
        return variables.get("SLURM_CONF") == str(self._config)


def _end_with_parent() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _three_ports() -> list[int]:
    """Free ports in a row, below those that the kernel gives to others at any moment (32768 and more)."""
    while True:
        first = random.randrange(10000, 19000)
        try:
            for port in range(first, first + 3):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + 3))
