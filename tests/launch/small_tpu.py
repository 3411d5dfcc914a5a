"""A TPU VM of two workers on this machine, behind a `gcloud` of a few lines: the one mock of a cloud's API.

It takes the place of Google's service and of ssh alone. What is sent to a worker runs through `bash -c`, as ssh's other
end runs it, in a home of that worker's own. The real gcloud cuts --command at spaces and joins it again, and so
does this one.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

WORKERS = 2


def install_gcloud(folder: Path, state: Path) -> dict[str, str]:
    """The environment in which `gcloud` is this one, with its files in `state`."""
    folder.mkdir()
    for worker in range(WORKERS):
        (state / f"worker_{worker}").mkdir(parents=True)
    script = folder / "gcloud"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{state}" "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(state: Path) -> list[list[str]]:
    """The words of every call so far."""
    path = state / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gcloud(state: Path, words: list[str]) -> int:
    """What one call does."""
    with (state / "calls.jsonl").open("a") as log:
        log.write(json.dumps(words) + "\n")
    kind, action, name = words[2:5]
    flags = dict(word[2:].partition("=")[::2] for word in words[5:] if word.startswith("--"))
    if action == "describe":
        return _describe(state / kind)
    if action == "create":
        (state / "tpu-vm").write_text("READY")
        (state / kind).write_text("ACTIVE" if kind == "queued-resources" else "READY")
    elif action == "delete":
        for made in ("tpu-vm", "queued-resources"):
            (state / made).unlink(missing_ok=True)
    elif action == "scp":
        source, target = (word for word in words[4:6])
        for worker in range(WORKERS):
            shutil.copy(
                source, state / f"worker_{worker}" / target.removeprefix(f"{target.partition(':')[0]}:")
            )
    elif action == "ssh":
        chosen = range(WORKERS) if flags["worker"] == "all" else [int(flags["worker"])]
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            codes = list(pool.map(lambda worker: _ssh(state, worker, flags["command"]), chosen))
        return next(filter(None, codes), 0)
    else:
        print(f"ERROR: unknown call {words} about {name}", file=sys.stderr)
        return 2
    return 0


def _describe(path: Path) -> int:
    if not path.exists():
        print("ERROR: NOT_FOUND", file=sys.stderr)
        return 1
    print(path.read_text())
    return 0


def _ssh(state: Path, worker: int, command: str) -> int:
    home = state / f"worker_{worker}"
    own = {
        "HOME": str(home),
        "TPU_WORKER_ID": str(worker),
        "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * WORKERS),
    }
    joined = " ".join(command.split(" "))
    return subprocess.run(
        ["bash", "-c", joined], cwd=home, env=os.environ | own, stdin=subprocess.DEVNULL
    ).returncode


if __name__ == "__main__":
    sys.exit(gcloud(Path(sys.argv[1]), sys.argv[2:]))
