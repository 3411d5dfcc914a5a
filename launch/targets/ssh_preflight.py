"""What is looked at on every machine, all at once, before the first process starts.

A job of many machines fails on the worst of them, minutes later and somewhere else; so every mistake that can
be seen from here is told now, with the machine's name, and all of them in one message.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.targets import ssh_probe
from launch.targets.host_file import Host
from launch.targets.ssh_connection import Answer, Ssh, explain_failure, quote_path, render
from pgdist.errors import ConfigError

OLDEST_PYTHON = (3, 11)  # as in setup.py

_SECONDS = 90.0  # for connecting, --setup and a look around


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where pgdist is on a host.

    directory: of the code; where every command runs.  python: by name or path; with a slash, from there on.
    setup: shell commands before it, "" for none.
    """

    directory: str
    python: str
    setup: str

    def words(self) -> dict[str, str]:
        """As the scripts' templates want it."""
        return {
            "directory": quote_path(self.directory),
            "python": quote_path(self.python),
            "setup": shlex.quote(self.setup) if self.setup else "",
        }


def probe_script(place: Place, *, port: int) -> str:
    """What asks a host for the Python and the code at `place`, and whether `port`, if not 0, is free."""
    source = Path(ssh_probe.__file__).read_text(encoding="utf-8")
    return render("ssh_probe", **place.words(), source=shlex.quote(source), port=port)


def check_hosts(ssh: Ssh, hosts: Sequence[Host], places: Sequence[Place], *, port: int) -> None:
    """Raises ConfigError unless all hosts can be reached and would run this very code.

    port: that the first host's agent will listen on, 0 if there is only one host.
    """
    scripts = [
        probe_script(place, port=0 if number else port).encode() for number, place in enumerate(places)
    ]
    answers = ssh.run_on_all(hosts, scripts, seconds=_SECONDS)
    facts = [_facts(answer) for answer in answers]
    own_code = ssh_probe.describe()["code"]
    mistakes = []
    for answer, place, fact in zip(answers, places, facts, strict=True):
        if fact is None:
            mistakes.append(explain_failure(answer, **dataclasses.asdict(place)))
        elif mistake := _mistake(fact, place, own_code=own_code, port=port):
            mistakes.append(f"{answer.host}: {mistake}")
    if not mistakes:
        mistakes = _differences(hosts, [fact for fact in facts if fact])
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _facts(answer: Answer) -> dict[str, Any] | None:
    lines = [line for line in answer.output.splitlines() if line.startswith(ssh_probe.MARK)]
    return json.loads(lines[-1].removeprefix(ssh_probe.MARK)) if lines and answer.code == 0 else None


def _mistake(fact: Mapping[str, Any], place: Place, *, own_code: str, port: int) -> str:
    version = ".".join(map(str, fact["python"]))
    if tuple(fact["python"][:2]) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return f"{fact['executable']} is Python {version}; expected {oldest} or newer: --remote_python=PATH"
    if fact["code"] is None:
        return f"no pgdist in {place.directory}; --remote_dir names the folder that holds it, or give --ship"
    if fact["code"] != own_code:
        return (
            f"the pgdist in {place.directory} is not the one that you are starting this with; bring it to "
            "the same state, or give --ship"
        )
    if fact["jax"] is None:
        return f"{fact['executable']} has no JAX; install pgdist's packages for it, or name another Python"
    if not fact.get("port_is_free", True):
        return f"port {port} is taken there, perhaps by another job; choose one with --port=PORT"
    return ""


def _differences(hosts: Sequence[Host], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Machines with other versions than most: their processes would not understand each other."""
    versions = [(".".join(map(str, fact["python"][:2])), fact["jax"]) for fact in facts]
    usual = Counter(versions).most_common(1)[0][0]
    return [
        f"{host}: Python {version[0]} with JAX {version[1]}; other hosts have {usual[0]} with {usual[1]}"
        for host, version in zip(hosts, versions, strict=True)
        if version != usual
    ]
