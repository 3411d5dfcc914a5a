"""Asking a Kubernetes cluster, through the command that its users have: `kubectl`.

`record` says where: its `context` and its `namespace`, "" for kubectl's own choice.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from pgdist.errors import ConfigError

_SECONDS = 120.0  # for an answer; a cluster that cannot be reached takes kubectl about 30


class KubectlError(ConfigError):
    """What kubectl refused, in its own words."""


def run(record: dict[str, Any], *arguments: str, text: str = "") -> str:
    """What the command prints.  text: its standard input.  KubectlError where it fails."""
    try:
        done = subprocess.run(
            command(record, *arguments), input=text, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise KubectlError(f"kubectl {arguments[0]} did not answer within {_SECONDS:g} s") from error
    if done.returncode != 0:
        raise KubectlError(f"kubectl {' '.join(arguments[:3])} failed: {done.stderr.strip()}")
    return done.stdout


def show(record: dict[str, Any], *arguments: str) -> int:
    """Runs the command in this terminal; returns its exit code."""
    return subprocess.run(command(record, *arguments), stdin=subprocess.DEVNULL).returncode


def command(record: dict[str, Any], *arguments: str) -> list[str]:
    """The command line.  ConfigError where there is no kubectl."""
    program = shutil.which("kubectl")
    if program is None:
        raise ConfigError(
            "--to=jobset needs kubectl, and there is none on the PATH. Install it, or apply what --dry_run prints "
            "from a machine that has it"
        )
    where = [f"--{name}={record[name]}" for name in ("context", "namespace") if record.get(name)]
    return [program, *where, *arguments]


def get(record: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """An object; {} where there is none."""
    answer = run(record, "get", kind, name, "--ignore-not-found", "--output=json")
    return json.loads(answer) if answer.strip() else {}


def get_all(record: dict[str, Any], kind: str, selector: str) -> list[dict[str, Any]]:
    """The objects with these labels, in the order of their names."""
    answer = run(record, "get", kind, f"--selector={selector}", "--output=json")
    return sorted(json.loads(answer)["items"], key=lambda item: item["metadata"]["name"])


def exit_code(pod: dict[str, Any]) -> int | None:
    """How the pod's process ended, None while it has not."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        if container["name"] == "agent" and "terminated" in container.get("state", {}):
            return container["state"]["terminated"]["exitCode"]
    return None


def describe_pod(pod: dict[str, Any]) -> str:
    """One line: its name, its phase, and how it ended or what it waits for."""
    state = pod.get("status", {})
    line = f"{pod['metadata']['name']}: {state.get('phase', 'Unknown')}"
    if (code := exit_code(pod)) is not None:
        return f"{line}, exit code {code}"
    waiting = [
        status["state"]["waiting"]
        for status in state.get("containerStatuses", [])
        if "waiting" in status.get("state", {})
    ]
    reasons = [f"{wait.get('reason', '')} {wait.get('message', '')}".strip() for wait in waiting]
    reasons += [
        condition.get("message", "")
        for condition in state.get("conditions", [])
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    return ", ".join([line, *filter(None, reasons)])
