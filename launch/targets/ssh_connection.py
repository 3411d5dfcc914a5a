"""Running scripts on other machines with the `ssh` of this one.

What runs over there is always `bash -s`, and the script comes through its standard input: so it is quoted
once, for bash, whatever the login shell is. Its output and errors come back as one stream, which leaves the
standard error of `ssh` to what ssh itself has to say.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.targets.host_file import Host
from pgdist.errors import ConfigError

LOST = 255  # ssh's own failures: no connection, or it broke; and what ran there was killed

# Seconds. The machines give the launcher up before it gives them up: the next attempt finds them free.
SIGN_OF_LIFE = "here"
LIFE_EVERY = 5
SILENCE = 30

# What the scripts leave with when they cannot begin.
CODES = {"directory": 90, "setup": 91, "python": 92, "unpack": 93}

# The first value of an option wins, so these yield to --ssh_option and overrule the files.
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
    "LogLevel=ERROR",
    "ClearAllForwardings=yes",
    "ControlMaster=no",  # one that this connection left in the background would keep its output open
    "RemoteCommand=none",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a script on a host.

    code: its own, or LOST.  ssh_said: what ssh complained of.  by_hand: how a user can try the connection.
    """

    host: Host
    code: int
    output: str
    ssh_said: str
    by_hand: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ssh:
    """How to connect.  options: NAME=VALUE, as after `ssh -o`.  config, identity: files, "" for ssh's own."""

    options: tuple[str, ...] = ()
    config: str = ""
    identity: str = ""

    def command(self, host: Host, *remote: str) -> list[str]:
        """The command line that runs `remote` on the host."""
        words = ["ssh", "-T", *self._files()]
        for option in (*self.options, *_OPTIONS):
            words += ["-o", option]
        return [*words, *self._where(host), "--", host.name, *remote]

    def address(self, host: Host) -> str:
        """What the other machines reach the host by: its name, for which ssh may know another."""
        if host.address:
            return host.address
        try:
            asked = subprocess.run(
                ["ssh", "-G", *self._files(), "--", host.name], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return host.name
        settings = [line.partition(" ") for line in asked.stdout.splitlines()]
        return next((value for name, _, value in settings if name == "hostname"), host.name)

    def run_on_all(self, hosts: Sequence[Host], scripts: Sequence[bytes], *, seconds: float) -> list[Answer]:
        """Runs on each host its script, all at once; what follows the script is the script's input."""
        with concurrent.futures.ThreadPoolExecutor(len(hosts)) as threads:
            return list(threads.map(lambda host, script: self._run(host, script, seconds), hosts, scripts))

    def _run(self, host: Host, script: bytes, seconds: float) -> Answer:
        try:
            done = subprocess.run(
                self.command(host, "bash", "-s"), input=script, capture_output=True, timeout=seconds
            )
        except FileNotFoundError:
            raise ConfigError(
                "there is no `ssh` on this machine: install OpenSSH's client, such as Debian's openssh-client"
            ) from None
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess([], LOST, b"", f"no answer within {seconds:g} s".encode())
        return Answer(
            host=host,
            code=done.returncode if done.returncode >= 0 else LOST,
            output=done.stdout.decode(errors="replace"),
            ssh_said=_last_lines(done.stderr.decode(errors="replace")),
            by_hand=shlex.join(["ssh", *self._files(), *self._where(host), host.name, "true"]),
        )

    def _where(self, host: Host) -> list[str]:
        port = ["-p", str(host.port)] * bool(host.port)
        return [*port, *["-l", host.user] * bool(host.user)]

    def _files(self) -> list[str]:
        return ["-F", self.config] * bool(self.config) + ["-i", self.identity] * bool(self.identity)


def render(template: str, **values: Any) -> str:
    """A script from the templates beside this file; the values are quoted already."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    return environment.get_template(f"{template}.sh.jinja").render(codes=CODES, **values)


def quote_path(path: str) -> str:
    """The path for a shell of another machine, where `~` is the home folder over there."""
    home, slash, rest = path.partition("/")
    if home != "~":
        return shlex.quote(path)
    return '"$HOME"' + (slash + shlex.quote(rest) if rest else "")


def explain_failure(answer: Answer, *, directory: str, python: str, setup: str) -> str:
    """What to tell a user whose script did not come as far as what it was for."""
    said = _last_lines(answer.output)
    if answer.code == LOST:
        return (
            f"{answer.host}: cannot connect: {answer.ssh_said or said or 'ssh ended with code 255'}. It must "
            f"work without a question being asked; try: {answer.by_hand}"
        )
    if answer.code == CODES["directory"]:
        return f"{answer.host}: no folder {directory} there ({said}); --remote_dir names it, or give --ship"
    if answer.code == CODES["setup"]:
        return f"{answer.host}: --setup={setup} failed: {said}"
    if answer.code == CODES["python"]:
        return (
            f"{answer.host}: no {python} there; say where it is with --remote_python=PATH, or let "
            "--setup='source .venv/bin/activate' find it"
        )
    if answer.code == CODES["unpack"]:
        return f"{answer.host}: cannot unpack the code in {directory}: {said}"
    return f"{answer.host}: ended with code {answer.code}: {said or answer.ssh_said}"


def _last_lines(text: str) -> str:
    """The end of what was said, in one line."""
    return "; ".join(line.strip().rstrip(".") for line in text.splitlines()[-3:] if line.strip())
