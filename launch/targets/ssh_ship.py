"""Sending the code of this checkout to machines that do not have it.

What git would show of the working tree goes: what it tracks, as it stands now, and what is new and not
ignored. Every machine gets a new folder for each job, so a job's code never changes under it; nothing is
removed there, since a job may have written beside its code.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from launch.targets.host_file import Host
from launch.targets.ssh_connection import Ssh, explain_failure, quote_path, render
from pgdist.errors import ConfigError

PARENT = "~/.pgdist/shipped"

_SECONDS = 600.0


def shipped_directory(parent: str, job_id: str, host: int) -> str:
    """Where host number `host` gets its code; each its own, for the folder may be shared between them."""
    return f"{parent.rstrip('/')}/{job_id}/host_{host:03d}"


def pack(root: Path) -> bytes:
    """The files of the checkout at `root`, as a compressed tar.  ConfigError where git does not know them."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise ConfigError(
            f"--ship sends what git lists of {root}, and git cannot: {reason}. Copy the code to the hosts "
            "yourself and name its folder with --remote_dir"
        ) from error
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=6) as tar:
        for name in sorted(set(filter(None, os.fsdecode(listed.stdout).split("\0")))):
            if os.path.lexists(root / name):  # not what was deleted without telling git
                tar.add(root / name, arcname=name, recursive=False, filter=_without_owner)
    return archive.getvalue()


def ship(ssh: Ssh, hosts: Sequence[Host], directories: Sequence[str], archive: bytes) -> None:
    """Unpacks the archive on every host in its directory.  ConfigError with what went wrong on which."""
    scripts = [
        render("ssh_ship", directory=quote_path(directory)).encode() + archive for directory in directories
    ]
    answers = ssh.run_on_all(hosts, scripts, seconds=_SECONDS)
    mistakes = [
        explain_failure(answer, directory=directory, python="", setup="")
        for answer, directory in zip(answers, directories, strict=True)
        if answer.code != 0
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The files shall belong to whoever unpacks them, as root too."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
