"""Machines that ssh reaches and no scheduler rules: an agent on each, and this launcher to restart them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import secrets
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import launch
from launch import attached, entry
from launch.attempts import start_time
from launch.job_status import follow_logs
from launch.submission import Submission
from launch.targets import ssh_ship
from launch.targets.host_file import Host, read_host_file
from launch.targets.ssh_connection import SIGN_OF_LIFE, SILENCE, Ssh, render
from launch.targets.ssh_launcher import Launcher
from launch.targets.ssh_preflight import Place, check_hosts
from pgdist.errors import ConfigError

_HOST_FILE = flags.DEFINE_string("host_file", None, "File with a machine a line: gpu1 slots=4.")
_SSH_OPTION = flags.DEFINE_multi_string("ssh_option", [], "NAME=VALUE for ssh -o; may be repeated.")
_SSH_CONFIG = flags.DEFINE_string(
    "ssh_config", "", "Configuration file for ssh, not ~/.ssh/config.", short_name="F"
)
_IDENTITY = flags.DEFINE_string("identity", "", "Private key file for ssh.")
_REMOTE_DIR = flags.DEFINE_string(
    "remote_dir", "", "Folder of the code there (default: the same as here); with --ship, where to put it."
)
_SHIP = flags.DEFINE_bool("ship", False, "Send the code of this checkout to a new folder on each machine.")
_REMOTE_PYTHON = flags.DEFINE_string(
    "remote_python", "python3", "Python there; a path with a slash is relative to the code's folder."
)
_SETUP = flags.DEFINE_string(
    "setup", "", "Shell commands to run first there: 'source .venv/bin/activate; export NCCL_DEBUG=INFO'."
)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", 0, "Simulate so many CPU devices in each process.", lower_bound=0
)
_GPUS = flags.DEFINE_string("gpus", "", "Each machine's GPUs to share among its processes: all, or 0,1,...")
_RANKS = flags.DEFINE_string("ranks", "", "Processes whose lines are shown, as in 0,3; all by default.")
_PORT = flags.DEFINE_integer(
    "port", 29400, "Port of the first machine that the others can reach.", lower_bound=1, upper_bound=65535
)

_SHOW_EVERY = 0.2  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the flags ask for: who runs what where."""

    job_id: str
    ssh: Ssh
    hosts: list[Host]
    places: list[Place]
    scripts: list[str]


def dry_run(submission: Submission) -> str:
    """The command line for each host, and the script that goes through it; connects to none."""
    plan = _plan(submission, job_id="JOB")
    parts = []
    if _SHIP.value:
        parts.append(f"# what git lists of {_root()} is unpacked in the folders below\n")
    for host, script in zip(plan.hosts, plan.scripts, strict=True):
        command = shlex.join(plan.ssh.command(host, "bash", "-s"))
        parts.append(f"# {command} <<'SCRIPT'\n{script}# SCRIPT\n")
    return "\n".join(parts)


def start(submission: Submission) -> int:
    """Runs the job to its end; a dropped launcher ends it, so it cannot be detached from."""
    if submission.detach:
        raise ConfigError(
            "--detach does not go with --to=ssh: the launcher keeps the job running, and when it ends, the job "
            "ends. Start it in tmux or screen, or with nohup, instead"
        )
    if not shutil.which("ssh"):
        raise ConfigError(
            "there is no `ssh` on this machine: install OpenSSH's client, such as Debian's openssh-client"
        )
    job_id = f"{submission.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    plan = _plan(submission, job_id=job_id)
    if _SHIP.value:
        archive = ssh_ship.pack(_root())
        ssh_ship.ship(plan.ssh, plan.hosts, [place.directory for place in plan.places], archive)
        for host, place in zip(plan.hosts, plan.places, strict=True):
            print(f"pgdist: {host}: code sent to {place.directory} ({len(archive) / 1e6:.1f} MB)")
    check_hosts(plan.ssh, plan.hosts, plan.places, port=_PORT.value if len(plan.hosts) > 1 else 0)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    launcher = Launcher(
        submission=submission,
        job_id=job_id,
        ssh=plan.ssh,
        hosts=plan.hosts,
        scripts=plan.scripts,
        facts={"launcher": _this_process(), "hosts": [str(host) for host in plan.hosts]},
        show=lines.put,
    )
    return _stay(launcher, lines)


def status(record: dict[str, Any]) -> str:
    """Whether the launcher lives; what its job does stands in the workdir."""
    launcher = record["launcher"]
    if launcher["machine"] != socket.gethostname():
        return (
            f"started by process {launcher['pid']} on {launcher['machine']}; whether it lives is known there"
        )
    return f"launcher: process {launcher['pid']}" + ("" if _lives(launcher) else ", which has ended")


def logs(record: dict[str, Any], *, follow: bool) -> None:
    """Prints the logs of all processes, which lie in the workdir that the machines share."""
    follow_logs(record["workdir"], follow=follow)


def cancel(record: dict[str, Any]) -> None:
    """Asks the launcher to let all processes save and end.  ConfigError where it runs on another machine."""
    launcher = record["launcher"]
    if launcher["machine"] != socket.gethostname():
        raise ConfigError(
            f"the job was started on {launcher['machine']}: cancel it there, or press Ctrl-C where it runs"
        )
    if not _lives(launcher):
        print(f"The launcher (process {launcher['pid']}) has ended, and its job with it.")
        return
    os.kill(launcher["pid"], signal.SIGTERM)
    print(f"Asked the launcher (process {launcher['pid']}) to let the job save and end.")


def _stay(launcher: Launcher, lines: queue.SimpleQueue[str]) -> int:
    """Shows lines and passes signals on, while a thread of its own keeps the job running."""

    def show() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                print(lines.get_nowait(), flush=True)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        code = thread.submit(launcher.run)
        try:
            attached.watch(
                is_running=lambda: not code.done(),
                show=show,
                stop=launcher.stop,
                kill=launcher.kill,
                interval=_SHOW_EVERY,
            )
        finally:
            launcher.abandon()  # when nobody reads what is shown, nobody would hear Ctrl-C either
        return code.result()


def _plan(submission: Submission, *, job_id: str) -> _Plan:
    entry.require("host_file")
    hosts = read_host_file(_HOST_FILE.value)
    files = {"ssh_config": _SSH_CONFIG.value, "identity": _IDENTITY.value}
    for name, path in files.items():
        if path and not os.access(os.path.expanduser(path), os.R_OK):
            raise ConfigError(f"--{name}={path}: expected a file that can be read")
        files[name] = os.path.expanduser(path)
    ssh = Ssh(options=tuple(_SSH_OPTION.value), config=files["ssh_config"], identity=files["identity"])
    places = [_place(host, number, job_id) for number, host in enumerate(hosts)]
    if len({place.directory for place in places}) > 1 or _SHIP.value:
        _require_one_workdir(submission.workdir)
    rendezvous = _rendezvous(ssh, hosts) if len(hosts) > 1 else ""
    scripts = []
    for number, (host, place) in enumerate(zip(hosts, places, strict=True)):
        own = [f"--hosts={len(hosts)}", f"--host={number}", f"--processes={host.slots}", f"--job_id={job_id}"]
        own += [f"--rendezvous={rendezvous}"] * bool(rendezvous)
        own += [f"--devices_per_process={_DEVICES.value}"] * bool(_DEVICES.value)
        own += [f"--gpus={_GPUS.value}"] * bool(_GPUS.value)
        own += [f"--ranks={_RANKS.value}"] * bool(_RANKS.value)
        scripts.append(_script(submission.agent_command(*own, "--end_with_stdin"), host, place))
    return _Plan(job_id=job_id, ssh=ssh, hosts=hosts, places=places, scripts=scripts)


def _script(agent: Sequence[str], host: Host, place: Place) -> str:
    words = place.words()
    command = " ".join([words["python"], *map(shlex.quote, agent[1:])])
    return render(
        "ssh_agent", **words, host=host, command=command, silence=SILENCE, sign_of_life=SIGN_OF_LIFE
    )


def _place(host: Host, number: int, job_id: str) -> Place:
    if _SHIP.value:
        parent = host.directory or _REMOTE_DIR.value or ssh_ship.PARENT
        directory = ssh_ship.shipped_directory(parent, job_id, number)
    else:
        directory = host.directory or _REMOTE_DIR.value or os.getcwd()
    return Place(directory=directory, python=_REMOTE_PYTHON.value, setup=_SETUP.value)


def _require_one_workdir(workdir: str) -> None:
    if workdir and not (workdir.startswith(("/", "~/")) or "://" in workdir):
        raise ConfigError(
            f"--workdir={workdir}: expected a full path: the hosts run in different folders, and must all "
            "write into one that they share"
        )


def _rendezvous(ssh: Ssh, hosts: Sequence[Host]) -> str:
    first, others = hosts[0], hosts[1:]
    address = ssh.address(first)
    if not first.address and first.is_loopback() and not all(host.is_loopback() for host in others):
        raise ConfigError(
            f"{_HOST_FILE.value}: the other hosts cannot reach the first one as {first.name}; write "
            f"{first.name} address=..., with its name in your network"
        )
    return f"[{address}]:{_PORT.value}" if ":" in address else f"{address}:{_PORT.value}"


def _root() -> Path:
    """The checkout that this code runs from."""
    return Path(launch.__file__).parents[1]


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"machine": socket.gethostname(), "pid": pid, "started": start_time(pid)}


def _lives(launcher: dict[str, Any]) -> bool:
    """Whether the process is there and still the one that it was: numbers are used again."""
    return start_time(launcher["pid"]) == launcher["started"] != ""
