"""A job on the tests' cluster, started as a user would, and what becomes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.targets.slurm_scheduler import State, parse_job
from tests.slurm.cluster import Cluster
from tests.tiny_runs import ROOT

SECONDS = 150  # for one start of a small job, on a busy machine
_DEVICES = "--devices_per_process=2"


def environment(cluster: Cluster) -> dict[str, str]:
    """For commands of ours; the processes of jobs inherit it."""
    variables = {name: value for name, value in cluster.environment().items() if name != "XLA_FLAGS"}
    return variables | {"PYTHONPATH": str(ROOT)}


def submit(cluster: Cluster, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`submit ARGUMENTS` in a folder, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launch.submit", *arguments],
        env=environment(cluster),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def training(config: Path, workdir: Path, *fields: str) -> list[str]:
    """The words for submit after its flags."""
    return [_DEVICES, "--", "launch.train", f"--config={config}", f"--workdir={workdir}", *fields]


class Job:
    """A batch job that trains in `workdir`."""

    def __init__(self, cluster: Cluster, workdir: Path) -> None:
        self.cluster = cluster
        self.workdir = workdir
        self.id: str = self.until(lambda: json.loads((workdir / "submitted.json").read_text()))["job_id"]

    def state(self) -> State:
        """What Slurm says of it."""
        return parse_job(self.cluster.run("scontrol", "--oneliner", "show", "job", self.id))

    def wait_for_state(self, *words: str, restarts: int = 0) -> State:
        """Once it is in one of these states, after so many restarts."""

        def look() -> State | None:
            state = self.state()
            return state if state.word in words and state.restarts >= restarts else None

        return self.until(look)

    def wait_for_training(self, *, attempt: int) -> None:
        """Once this attempt has logged two steps of its own."""
        host = self.workdir / "attempts" / f"{attempt:03d}" / "host_000.json"
        self.until(host.exists)
        before = max(self.steps(), default=0)
        self.until(lambda: max(self.steps(), default=0) >= before + 2)

    def steps(self) -> list[int]:
        """The steps that stand in metrics.jsonl, where the last line may not be whole yet."""
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [int(step) for step in re.findall(r'^\{"step": (\d+),.*train/loss', text, re.MULTILINE)]

    def processes(self, host: int, *, attempt: int) -> dict[str, Any]:
        """What the agent of a host has written."""
        return json.loads(
            (self.workdir / "attempts" / f"{attempt:03d}" / f"host_{host:03d}.json").read_text()
        )

    def codes(self) -> list[int | None]:
        """The verdicts of all attempts so far; None where nobody was left to say one."""
        found = []
        for folder in sorted((self.workdir / "attempts").glob("[0-9]*")):
            verdict = folder / "verdict.json"
            found.append(json.loads(verdict.read_text())["code"] if verdict.exists() else None)
        return found

    def log(self) -> str:
        """All that it has printed."""
        path = self.workdir / "logs" / f"slurm-{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else "no log"

    def until(self, look: Callable[[], Any], *, seconds: float = SECONDS) -> Any:
        """What `look` finds once it finds something; a file that is not there yet is nothing."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := look():
                    return found
            except (FileNotFoundError, ValueError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"not seen within {seconds} s:\n{self.log()[-5000:]}")
