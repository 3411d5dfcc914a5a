"""A cluster for one JobSet, on this machine: a `kubectl`, and behind it what the controllers are documented to do.

The pods are processes: the container's command with its arguments and variables expanded as the kubelet expands them,
from the repository as from an image's working directory. Their end is judged by the manifest's podFailurePolicy, in the
Job controller's words, and what becomes of the JobSet by its failurePolicy. What is not here is the API server (the
schemas stand in for it), the scheduler, and DNS: the first pod's name is replaced by a loopback address.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_POLL = 0.1  # seconds

_REFERENCE = re.compile(r"\$(\$|\(([^)]*)\))")


def expand(text: str, known: Mapping[str, str]) -> str:
    """`text` of a command, an argument or a value as the kubelet gives it to a container.

    $(NAME) is replaced where NAME is known, $$ by $; anything else stays.
    """

    def replace(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else known.get(match[2], match[0])

    return _REFERENCE.sub(replace, text)


def install_kubectl(folder: Path, state: Path) -> dict[str, str]:
    """The environment in which `kubectl` is this cluster's, with its files in `state`."""
    folder.mkdir()
    state.mkdir()
    script = folder / "kubectl"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{state}" "$@"\n')
    script.chmod(0o755)
    # The image's Python is the one that runs this.
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(path)}


def drain_node(state: Path, *, host: int) -> None:
    """What happens to the pod of a node that is taken away."""
    (state / f"drain_{host}").touch()


def read_pods(state: Path) -> list[dict[str, Any]]:
    """The pods as the API shows them."""
    return _read(state / "pods.json", [])


class Pod:
    """One pod, running from its first moment."""

    def __init__(
        self, state: Path, jobset: dict[str, Any], *, attempt: int, index: int, host: int, port: int
    ) -> None:
        replicated = jobset["spec"]["replicatedJobs"][0]
        self.job = replicated["template"]["spec"]
        name = jobset["metadata"]["name"]
        self.name = f"{name}-{replicated['name']}-{index}-{host}-{uuid.uuid4().hex[:5]}"
        self.index, self.host, self.is_drained = index, host, False
        self.labels = self.job["template"]["metadata"]["labels"] | {
            "jobset.sigs.k8s.io/jobset-uid": jobset["metadata"]["uid"],
            "jobset.sigs.k8s.io/restart-attempt": str(attempt),
            "jobset.sigs.k8s.io/job-index": str(index),
            "batch.kubernetes.io/job-completion-index": str(host),
        }
        self.uid = uuid.uuid4().hex
        container = self.job["template"]["spec"]["containers"][0]
        first = f"{name}-{replicated['name']}-0-0.{name}"
        port_of_first = next((p["containerPort"] for p in container.get("ports", [])), 0)

        def resolve(text: str) -> str:
            return text.replace(f"{first}:{port_of_first}", f"127.0.0.1:{port}").replace(first, "127.0.0.1")

        known = {"JOB_COMPLETION_INDEX": str(host)}
        for entry in container["env"]:
            known[entry["name"]] = (
                expand(entry["value"], known) if "value" in entry else self._field(entry["valueFrom"])
            )
        command = [resolve(expand(word, known)) for word in container["command"] + container["args"]]
        with (state / f"{self.name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | known, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _field(self, source: dict[str, Any]) -> str:
        # On pods, JobSet's labels are annotations too.
        return self.labels[re.fullmatch(r"metadata\.\w+\['(.+)'\]", source["fieldRef"]["fieldPath"])[1]]

    @property
    def code(self) -> int | None:
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def failure(self) -> tuple[str, str]:
        """The reason and the message with which its Job fails."""
        for number, rule in enumerate(self.job["podFailurePolicy"]["rules"]):
            exits = rule.get("onExitCodes", {"values": []})
            told = f"matching {rule['action']} rule at index {number}"
            if self.code in exits["values"]:
                what = f"Container agent for pod default/{self.name} failed with exit code {self.code}"
                return "PodFailurePolicy", f"{what} {told}"
            if self.is_drained and "onPodConditions" in rule:
                return "PodFailurePolicy", f"Pod default/{self.name} has condition DisruptionTarget {told}"
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"

    def seen(self) -> dict[str, Any]:
        """As the API shows it."""
        code = self.code
        ended = {None: "Running", 0: "Succeeded"}.get(code, "Failed")
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        return {
            "metadata": {"name": self.name, "uid": self.uid, "labels": self.labels},
            "status": {"phase": ended, "containerStatuses": [{"name": "agent", "state": state}]},
        }


def control(state: Path) -> None:
    """Runs the JobSet until it has finished or is deleted."""
    jobset = _read(state / "jobset.json", {})
    status = jobset.setdefault("status", {"restarts": 0, "restartsCountTowardsMax": 0})
    policy, replicated = jobset["spec"]["failurePolicy"], jobset["spec"]["replicatedJobs"][0]
    for attempt in itertools.count():
        indices = itertools.product(
            range(replicated["replicas"]), range(replicated["template"]["spec"]["completions"])
        )
        port = _free_port()
        pods = [Pod(state, jobset, attempt=attempt, index=i, host=h, port=port) for i, h in indices]
        while all(pod.code in (None, 0) for pod in pods) and any(pod.code is None for pod in pods):
            _drain(state, pods)
            _write(state / "pods.json", [pod.seen() for pod in pods])
            if (state / "deleted").exists():
                break
            time.sleep(_POLL)
        failed = [pod for pod in pods if pod.code]
        reason, message = failed[0].failure() if failed else ("", "")
        _end(state, pods)
        _write(state / "pods.json", [pod.seen() for pod in pods])
        if (state / "deleted").exists():
            time.sleep(0.3)  # nobody who looks every few seconds sees how they ended
            _write(state / "pods.json", [])
            (state / "jobset.json").unlink()
            return
        action = _action(policy["rules"], reason, message) if failed else "complete"
        if action == "RestartJobSet":
            if status["restartsCountTowardsMax"] >= policy["maxRestarts"]:
                action = "FailJobSet"
            else:
                status["restartsCountTowardsMax"] += 1
        if not action.startswith("Restart"):
            status["terminalState"] = "Completed" if action == "complete" else "Failed"
            status["conditions"] = [
                {"type": status["terminalState"], "status": "True", "reason": action, "message": message}
            ]
            _write(state / "jobset.json", jobset)
            return
        status["restarts"] += 1
        _write(state / "jobset.json", jobset)


def _action(rules: list[dict[str, Any]], reason: str, message: str) -> str:
    for rule in rules:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def _drain(state: Path, pods: list[Pod]) -> None:
    for pod in pods:
        if (state / f"drain_{pod.host}").exists():
            (state / f"drain_{pod.host}").unlink()
            pod.is_drained = True
            pod.process.send_signal(signal.SIGTERM)


def _end(state: Path, pods: list[Pod]) -> None:
    """Ends what still runs, as the kubelet does."""
    for pod in pods:
        if pod.code is None:
            pod.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + pods[0].job["template"]["spec"]["terminationGracePeriodSeconds"]
    while any(pod.code is None for pod in pods):
        if time.monotonic() > end or (state / "killed").exists():
            for pod in pods:
                pod.process.kill()
        time.sleep(_POLL)


def kubectl(state: Path, *arguments: str) -> int:
    """The few commands that the target uses."""
    words = [word for word in arguments if not word.startswith("--") or word == "-"]
    if words[0] == "create":
        jobset = json.load(sys.stdin)
        jobset["metadata"]["uid"] = uuid.uuid4().hex
        _write(state / "jobset.json", jobset)
        _write(state / "pods.json", [])
        with (state / "controller.log").open("ab") as log:
            controller = [sys.executable, __file__, str(state), "control"]
            subprocess.Popen(
                controller, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    elif words[:2] == ["get", "jobset"]:
        print((state / "jobset.json").read_text() if (state / "jobset.json").exists() else "")
    elif words[:2] == ["get", "pods"] and "--watch" in arguments:
        _watch(state)
    elif words[:2] == ["get", "pods"]:
        print(json.dumps({"items": read_pods(state)}))
    elif words[0] == "logs":
        names = words[1:] or [pod["metadata"]["name"] for pod in read_pods(state)]
        for name in names:
            _show(state, name, follow="--follow" in arguments)
    elif words[:2] == ["delete", "jobset"]:
        if _read(state / "jobset.json", {}).get("status", {}).get("terminalState"):
            (state / "jobset.json").unlink()
        else:
            (state / "deleted").touch()
    elif words[:2] == ["delete", "pods"]:
        (state / "killed").touch()
    else:
        print(f"error: unknown command {arguments}", file=sys.stderr)
        return 1
    return 0


def _watch(state: Path) -> None:
    """Prints a pod whenever it has changed, until it is ended."""
    seen: dict[str, Any] = {}
    while True:
        for pod in read_pods(state):
            if seen.get(pod["metadata"]["uid"]) != pod:
                seen[pod["metadata"]["uid"]] = pod
                print(json.dumps(pod, indent=4), flush=True)
        time.sleep(_POLL)


def _show(state: Path, name: str, *, follow: bool) -> None:
    with (state / f"{name}.log").open("rb") as log:
        running = True
        while running:
            running = follow and any(
                pod["metadata"]["name"] == name and pod["status"]["phase"] == "Running"
                for pod in read_pods(state)
            )
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
            if running:
                time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def _write(path: Path, value: Any) -> None:
    replacement = path.with_suffix(".new")
    replacement.write_text(json.dumps(value))
    replacement.replace(path)


if __name__ == "__main__":
    place, *rest = sys.argv[1:]
    if rest == ["control"]:
        control(Path(place))
    else:
        sys.exit(kubectl(Path(place), *rest))
