"""What this process may use of its machine: open files, locked memory, processes, shared memory, CPU, memory.

Data loading and communication libraries fail in odd ways where one of these is small, so a bug report has them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def describe_limits() -> dict[str, int | float | None]:
    """Each limit, None where there is none (or nobody can tell); sizes in bytes.

    `cpus` and `memory_bytes` are those of the control groups that a container or a scheduler has put this process
    into.
    """
    return {
        "open_files": _soft_limit(resource.RLIMIT_NOFILE),
        "locked_memory_bytes": _soft_limit(resource.RLIMIT_MEMLOCK),
        "processes": _soft_limit(resource.RLIMIT_NPROC),
        **_shared_memory(),
        "cpus": min(_cpu_limits(), default=None),
        "memory_bytes": min(_memory_limits(), default=None),
    }


def _soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _shared_memory() -> dict[str, int]:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return {}
    return {
        "shared_memory_bytes": found.f_blocks * found.f_frsize,
        "shared_memory_free_bytes": found.f_bavail * found.f_frsize,
    }


def _cpu_limits() -> Iterator[float]:
    for folder in _control_groups("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
            numbers = [number for name in names for number in _numbers(folder / name)]
            if len(numbers) == 2 and numbers[0] > 0:
                yield numbers[0] / numbers[1]


def _memory_limits() -> Iterator[int]:
    for folder in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            # Version 1 says "none" by a number near 2**63.
            yield from (limit for limit in _numbers(folder / name) if 0 < limit < 2**60)


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, and of those around them: all of their limits hold."""
    for line in _memberships():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / (controllers and controller)
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _memberships() -> list[str]:
    """`number:controllers:path` of each group that this process is in; version 2 names no controllers."""
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a file; none where it cannot be read or says "max"."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
