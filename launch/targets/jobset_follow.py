"""Staying with a JobSet: is it running, what does its first host print, and how did it end.

Each attempt has pods of its own, and a pod's log can be read only while the pod is there: so every look notes the
exit codes it sees, and starts `kubectl logs --follow` on the first host's pod as soon as that runs. Pods that are
deleted are gone within a second of their end: from a request to stop on, `kubectl get --watch` notes what they say.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from launch.targets import kubectl
from launch.targets.jobset_manifest import LABEL
from launch.verdict import BUG, FINISHED, PEER_LOST, verdict

_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
_SLICE = "jobset.sigs.k8s.io/job-index"
_HOST = "batch.kubernetes.io/job-completion-index"

_LAST_LINES_SECONDS = 10.0  # for a log to end after its pod
_SINCE_SECONDS = 6  # a bit more than between two looks: better a line twice than one lost
_UNKNOWN = 130  # the job was deleted before any pod said how it ended


class Follower:
    """Looks at one JobSet, as `attached.watch` asks it to; leaving the `with` ends the kubectls it has started."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self._codes: dict[int, dict[str, int]] = {}  # by attempt and pod
        self._jobset: dict[str, Any] = {}
        self._pods: list[dict[str, Any]] = []
        self._log: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._watched: IO[bytes] = tempfile.TemporaryFile()
        self._followed = ""  # the pod of that log
        self._waiting = ""  # what was last said about a pod that does not run yet
        self._is_failing = False

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        for process in filter(None, (self._log, self._watch)):
            process.terminate()
            process.wait()
        self._watched.close()

    def is_running(self) -> bool:
        """Looks again; False when the JobSet has finished, or is gone with all its pods."""
        try:
            self._jobset = kubectl.get(self._record, "jobset", self._record["name"])
            self._pods = kubectl.get_all(self._record, "pods", f"{LABEL}={self._record['name']}")
        except kubectl.KubectlError as error:  # the job goes on whether or not the cluster answers us
            if not self._is_failing:
                print(f"pgdist: warning: {error}; still trying", file=sys.stderr)
                self._is_failing = True
            return True
        self._is_failing = False
        for pod in self._pods:
            self._note(pod)
        if not self._jobset:
            return bool(self._pods)
        return not self._jobset.get("status", {}).get("terminalState")

    def expect_deletion(self) -> None:
        """From now on the pods are watched without a gap."""
        if self._watch is None:
            selector = f"--selector={LABEL}={self._record['name']}"
            self._watch = subprocess.Popen(
                kubectl.command(self._record, "get", "pods", selector, "--watch", "--output=json"),
                stdin=subprocess.DEVNULL,
                stdout=self._watched,
                start_new_session=True,
            )

    def show(self) -> None:
        """Follows the newest pod of the first host, once it runs; says what it waits for until then."""
        firsts = [pod for pod in self._pods if _number(pod, _SLICE) == _number(pod, _HOST) == 0]
        if not firsts:
            return
        newest = max(firsts, key=lambda pod: _number(pod, _ATTEMPT))
        phase = newest.get("status", {}).get("phase", "Pending")
        if phase == "Pending":
            if (waiting := kubectl.describe_pod(newest)) != self._waiting:
                print(f"pgdist: {waiting}", file=sys.stderr)
                self._waiting = waiting
        elif newest["metadata"]["uid"] != self._followed:
            self._end_log()
            self._followed = newest["metadata"]["uid"]
            self._begin_log(newest)
        elif phase == "Running" and self._log is not None and self._log.poll() is not None:
            self._begin_log(newest, f"--since={_SINCE_SECONDS}s")  # the cluster has closed the connection

    def code(self) -> int:
        """The job's exit code, once it has ended."""
        self._end_log()
        for pod in self._watched_pods():
            self._note(pod)
        status = self._jobset.get("status", {})
        if status.get("terminalState") == "Completed":
            return FINISHED
        if codes := self._codes.get(max(self._codes, default=0)):
            return verdict(codes.values())
        if not self._jobset:
            print("pgdist: deleted before a pod said how it ended; its workdir tells", file=sys.stderr)
            return _UNKNOWN
        reasons = [condition.get("reason") for condition in status.get("conditions", [])]
        return PEER_LOST if "ReachedMaxRestarts" in reasons else BUG

    def _note(self, pod: dict[str, Any]) -> None:
        if (code := kubectl.exit_code(pod)) is not None:
            self._codes.setdefault(_number(pod, _ATTEMPT), {})[pod["metadata"]["uid"]] = code

    def _watched_pods(self) -> Iterator[dict[str, Any]]:
        """Every state of a pod that was seen since `expect_deletion`: one object after the other."""
        self._watched.seek(0)
        text, decoder = self._watched.read().decode(errors="replace").lstrip(), json.JSONDecoder()
        while text:
            try:
                pod, end = decoder.raw_decode(text)
            except ValueError:
                return  # the last one was still being written
            yield pod
            text = text[end:].lstrip()

    def _begin_log(self, pod: dict[str, Any], *options: str) -> None:
        # A session of its own: Ctrl-C is for the job, whose last words are still to be shown.
        self._log = subprocess.Popen(
            kubectl.command(self._record, "logs", "--follow", *options, pod["metadata"]["name"]),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end_log(self) -> None:
        if self._log is None:
            return
        try:
            self._log.wait(timeout=_LAST_LINES_SECONDS)
        except subprocess.TimeoutExpired:
            self._log.terminate()
            self._log.wait()
        self._log = None


def _number(pod: dict[str, Any], label: str) -> int:
    return int(pod["metadata"].get("labels", {}).get(label, 0))
