"""TPU VMs of Google Cloud, without Kubernetes: one slice, made if need be, with one agent a worker.

Everything is a gcloud command (`tpu_vm_commands.py`); --dry_run prints them all as the script that is run.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from launch import attached
from launch.submission import Submission
from launch.targets.ssh_ship import pack
from launch.targets.tpu_vm_commands import Job, Tpu, script
from launch.targets.tpu_vm_follow import Follower
from launch.verdict import PEER_LOST
from pgdist.errors import ConfigError

_TPU_NAME = flags.DEFINE_string("tpu_name", None, "Name of the TPU VM, there already or to be made.")
_ZONE = flags.DEFINE_string("zone", None, "Its zone, such as us-west4-a.")
_PROJECT = flags.DEFINE_string("project", "", "Its project, if not gcloud's.")
_ACCELERATOR_TYPE = flags.DEFINE_string("accelerator_type", None, "To make it: such as v5litepod-16.")
_RUNTIME_VERSION = flags.DEFINE_string(
    "runtime_version", None, "Its system image; by default the one for its generation."
)
_NETWORK = flags.DEFINE_string("network", "", "Its network, if not the default one.")
_SPOT = flags.DEFINE_bool("spot", False, "May be taken away at any time, and costs less.")
_RESERVED = flags.DEFINE_bool("reserved", False, "From a reservation.")
_QUEUED = flags.DEFINE_bool("queued", False, "Asked for as a queued resource, and waited for.")
_VALID_UNTIL = flags.DEFINE_string("valid_until", "", "With --queued: give up after, such as 6h.")
_INTERNAL_IP = flags.DEFINE_bool("internal_ip", False, "No external addresses; ssh inside the network.")
_REPO = flags.DEFINE_string("repo", "", "URL[@REVISION] that the workers clone, instead of the code here.")
_SETUP = flags.DEFINE_multi_string(
    "setup", [], "Line of shell for each worker, in the code's folder, such as a mount; may be repeated."
)
_PYTHON = flags.DEFINE_string(
    "python", "", "Python on the workers that has the packages; by default one is made with uv."
)
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; may be repeated.")
_PORT = flags.DEFINE_integer("rendezvous_port", 8490, "Where worker 0's agent listens.", 1, 65535)
_DELETE = flags.DEFINE_bool("delete", False, "Delete the TPU when the job has ended, or with cancel.")

ROOT = Path(__file__).parents[2]

# Google's system images for JAX, by generation.
_RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_FORMS = {
    "tpu_name": (_NAME, "lower-case letters, digits and dashes"),
    "zone": (re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]"), "a zone such as us-west4-a"),
    "project": (re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"), "a project's id"),
    "runtime_version": (re.compile(r"[a-z0-9][-a-z0-9.]*"), "a system image such as v2-alpha-tpuv6e"),
    "network": (re.compile(r"[-a-z0-9/._]+"), "a network's name"),
    "valid_until": (re.compile(r"([0-9]+[smhd])+"), "a duration such as 6h"),
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", re.DOTALL)
_POLL_SECONDS = 1.0


def dry_run(submission: Submission) -> str:
    """The script."""
    tpu, job = _tpu(), _job(submission)
    return script(tpu, job, submission)


def start(submission: Submission) -> int:
    """Runs the script; attached, follows worker 0's log until the job has ended, and returns its code."""
    tpu, job = _tpu(), _job(submission)
    text = script(tpu, job, submission)
    _require_gcloud()
    if not job.repository and not (ROOT / ".git").exists():
        raise ConfigError(
            f"the code in {ROOT} is no git checkout, of which the listed files would be sent to the workers: give "
            "--repo=URL, which they clone"
        )
    with tempfile.TemporaryDirectory(prefix="pgdist_tpu_vm_") as scratch:
        archive = Path(scratch) / job.archive
        if not job.repository:
            archive.write_bytes(pack(ROOT))
        done = subprocess.run(["bash", "-c", text, "tpu_vm", str(archive)], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise ConfigError(
            f"the job was not started: a command of gcloud failed with code {done.returncode}, as it says above. The "
            f"TPU may exist; `{shlex.join(tpu.delete())}` deletes it"
        )
    print(f"pgdist: job {job.name} runs on TPU {tpu.name}", file=sys.stderr)
    if submission.detach:
        return 0
    with Follower(tpu, job) as follower:
        attached.watch(
            is_running=follower.is_running,
            show=follower.show,
            stop=lambda: _run(tpu.ssh(job.ask("stop"))),
            kill=lambda: _run(tpu.ssh(job.ask("kill"))),
            interval=_POLL_SECONDS,
        )
        code = PEER_LOST if follower.code is None else follower.code
    if _DELETE.value:
        _run(tpu.delete())
    return code


def find(name: str) -> dict[str, Any]:
    """The record of the job of that name on the TPU that the flags name; its workdir is on the workers."""
    return {
        "target": "tpu_vm",
        "name": name,
        "tpu": dataclasses.asdict(_tpu(is_there=True)),
        "python": _PYTHON.value,
    }


def status(record: dict[str, Any]) -> str:
    """What each worker says of the job."""
    tpu, job = _from_record(record)
    done = subprocess.run(
        _with_gcloud(tpu.ssh(job.ask("status"))), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return "\n".join(sorted(done.stdout.splitlines())) if done.returncode == 0 else done.stderr.strip()


def logs(record: dict[str, Any], *, follow: bool = False) -> None:
    """Prints the log of worker 0, to the job's end; without `follow` those of all workers, one after the other."""
    tpu, job = _from_record(record)
    if follow:
        _run(tpu.ssh(job.log(follow=True), worker="0"))
    else:
        _run(tpu.ssh(job.log()))


def cancel(record: dict[str, Any]) -> None:
    """Asks the agents of all workers to save and end; with --delete, deletes the TPU when they have."""
    tpu, job = _from_record(record)
    _run(tpu.ssh(job.ask("stop")))
    if _DELETE.value:
        _run(tpu.ssh(job.log(follow=True), worker="0"))
        _run(tpu.delete())


def _tpu(*, is_there: bool = False) -> Tpu:
    """The TPU that the flags mean.  is_there: how it is made is nothing to ask about."""
    for name in ("tpu_name", "zone"):
        if not flags.FLAGS[name].value:
            raise ConfigError(f"--{name} must be given")
    for name, (form, expected) in _FORMS.items():
        value = flags.FLAGS[name].value
        if value and not form.fullmatch(value):
            raise ConfigError(f"--{name}={value!r}: expected {expected}")
    if _VALID_UNTIL.value and not _QUEUED.value:
        raise ConfigError("--valid_until means nothing without --queued")
    if _SPOT.value and _RESERVED.value:
        raise ConfigError("--spot and --reserved exclude each other")
    accelerator = _ACCELERATOR_TYPE.value or ""
    if not is_there and not accelerator:
        raise ConfigError("--accelerator_type must be given, such as v5litepod-16")
    return Tpu(
        name=_TPU_NAME.value,
        zone=_ZONE.value,
        project=_PROJECT.value,
        accelerator_type=accelerator,
        runtime_version=_RUNTIME_VERSION.value or _default_runtime_version(accelerator),
        network=_NETWORK.value,
        spot=_SPOT.value,
        reserved=_RESERVED.value,
        queued=_QUEUED.value,
        valid_until=_VALID_UNTIL.value,
        internal_ip=_INTERNAL_IP.value,
    )


def _default_runtime_version(accelerator: str) -> str:
    """The system image for a type, which is checked."""
    if not accelerator:
        return ""
    generation, _, size = accelerator.partition("-")
    if generation not in _RUNTIME_VERSIONS or not re.fullmatch("[1-9][0-9]*", size):
        known = ", ".join(_RUNTIME_VERSIONS)
        raise ConfigError(
            f"--accelerator_type={accelerator!r}: expected GENERATION-SIZE, such as v5litepod-16, with one of the "
            f"generations {known}"
        )
    return _RUNTIME_VERSIONS[generation]


def _job(submission: Submission) -> Job:
    """The job that the flags mean, as the workers know it."""
    workdir = submission.workdir
    if workdir and not (workdir.startswith("gs://") or os.path.isabs(workdir)):
        raise ConfigError(
            f"--workdir={workdir}: expected a bucket, gs://BUCKET/RUN, or an absolute path on the workers, where there "
            "are several on a filesystem that all mount (--setup can mount it)"
        )
    if bad := [text for text in _ENV.value if not _VARIABLE.fullmatch(text)]:
        raise ConfigError(f"--env={bad[0]!r}: expected NAME=VALUE, a name of letters, digits and underscores")
    if not _NAME.fullmatch(submission.name):
        raise ConfigError(f"--name={submission.name!r}: expected lower-case letters, digits and dashes")
    repository, at, revision = _REPO.value.rpartition("@")
    if not at or "/" in revision or ":" in revision:  # the @ of git@host:path, or none
        repository, revision = _REPO.value, ""
    if repository.startswith("-") or revision.startswith("-"):
        raise ConfigError(f"--repo={_REPO.value!r}: expected URL or URL@REVISION")
    return Job(
        name=submission.name,
        python=_PYTHON.value,
        repository=repository,
        revision=revision,
        setup=tuple(_SETUP.value),
        variables=tuple(_ENV.value),
        port=_PORT.value,
    )


def _from_record(record: dict[str, Any]) -> tuple[Tpu, Job]:
    return Tpu(**record["tpu"]), Job(name=record["name"], python=record["python"])


def _run(command: list[str]) -> None:
    """Runs it in this terminal; a failure is gcloud's to explain."""
    subprocess.run(_with_gcloud(command), stdin=subprocess.DEVNULL, start_new_session=True)


def _with_gcloud(command: list[str]) -> list[str]:
    _require_gcloud()
    return command


def _require_gcloud() -> None:
    if shutil.which("gcloud") is None:
        raise ConfigError(
            "--to=tpu_vm needs gcloud, and there is none on the PATH. Install the Google Cloud CLI, or run what "
            "--dry_run prints on a machine that has it"
        )
