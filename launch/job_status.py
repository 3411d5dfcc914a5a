"""What the files of a workdir say of its job: the attempts, how far each process is, and the logs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.attempts import Attempt, Attempts
from launch.log_view import LogView, view_logs
from pgdist import files
from pgdist.errors import ConfigError

_INTERVAL = 0.5  # seconds


def describe_attempts(workdir: str) -> str:
    """One line an attempt, and one a process of the last one."""
    attempts = Attempts(workdir)
    lines = []
    for number in attempts.numbers():
        attempt = attempts.attempt(number)
        lines.append(f"attempt {number}: {_describe(attempt, is_newest=number == attempts.numbers()[-1])}")
    newest = attempts.newest()
    for host in newest.hosts() if newest else []:
        for process in host.get("processes", []):
            step = process.get("step")
            at = f"after step {step}" if step is not None and step >= 0 else ""
            what = f"{process['phase']} {at}".strip() if process["end"] == "running" else process["end"]
            lines.append(f"  process {process['process']} on {host['host']}: {what}")
    return "\n".join(lines) if lines else "no attempt has begun yet"


def _describe(attempt: Attempt, *, is_newest: bool) -> str:
    verdict, lease = attempt.verdict(), attempt.lease()
    if verdict:
        seconds = verdict["ended"] - verdict["started"]
        return f"code {verdict['code']} after {seconds:.0f} s: {verdict['reason']}"
    if is_newest and lease and not lease["ended"] and attempt.is_alive(lease):
        return f"running (agent {lease['pid']} on {lease['host']})"
    return "ended without a verdict: its agent was killed"


def is_running(workdir: str) -> bool:
    """Whether an agent holds the workdir."""
    newest = Attempts(workdir).newest()
    lease = newest.lease() if newest else {}
    return bool(lease) and not lease["ended"] and newest.is_alive(lease)


def follow_logs(workdir: str, *, follow: bool) -> None:
    """Prints the logs of all processes; with `follow` until the job has ended.  ConfigError without any."""
    logs_folder = files.open_folder(f"{workdir}/logs")
    folder = logs_folder.local
    views: dict[Path, LogView] = {}
    running = True
    while running:
        running = follow and is_running(workdir)
        logs_folder.fetch()  # of a workdir in a bucket
        logs = {int(path.stem.rpartition("_")[2]): (path, 0) for path in sorted(folder.glob("process_*.log"))}
        new = {number: log for number, log in logs.items() if log[0] not in views}
        for log, view in zip(new.values(), view_logs(new, ranks=None), strict=True):
            views[log[0]] = view
        for view in views.values():
            view.show(sys.stdout, to_the_end=not running)
        sys.stdout.flush()
        if running:
            time.sleep(_INTERVAL)
    if not views:
        raise ConfigError(f"no logs in {folder}: has the job begun?")
