"""The gcloud commands about one TPU VM and the job on it, as lists of words.

What a worker is to do travels in `ssh --command`: the shell of that worker reads it, after the local shell or none has
read the whole command. Every word is therefore quoted for the remote shell here, and once more where a script is
written for the local one. gcloud cuts the command at spaces and ssh puts them back; nothing is lost.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.submission import Submission

GCLOUD = ("gcloud", "compute", "tpus")

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["quote"] = shlex.quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """A TPU VM, there already or to be made, and how to reach it.

    queued: made by a queued resource of its name.  valid_until: a duration after which that is given up, "" for
    never.  internal_ip: no addresses outside its network.
    """

    name: str
    zone: str
    project: str = ""
    accelerator_type: str = ""
    runtime_version: str = ""
    network: str = ""
    spot: bool = False
    reserved: bool = False
    queued: bool = False
    valid_until: str = ""
    internal_ip: bool = False

    @property
    def place(self) -> list[str]:
        """The flags that say where it is, without questions."""
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else []), "--quiet"]

    def create(self) -> list[str]:
        """Makes it, or asks for it where it is queued."""
        options = [f"--accelerator-type={self.accelerator_type}"]
        options += [f"--network={self.network}"] if self.network else []
        options += ["--spot"] if self.spot else []
        options += ["--reserved"] if self.reserved else []
        options += ["--internal-ips"] if self.internal_ip else []
        if not self.queued:
            version = [f"--version={self.runtime_version}"]
            return [*GCLOUD, "tpu-vm", "create", self.name, *self.place, *version, *options]
        options += [f"--node-id={self.name}", f"--runtime-version={self.runtime_version}"]
        options += [f"--valid-until-duration={self.valid_until}"] if self.valid_until else []
        return [*GCLOUD, "queued-resources", "create", self.name, *self.place, *options]

    def describe(self) -> list[str]:
        """Prints its state, such as READY."""
        return [*GCLOUD, "tpu-vm", "describe", self.name, *self.place, "--format=value(state)"]

    def describe_queued(self) -> list[str]:
        """Prints the state of its queued resource, such as WAITING_FOR_RESOURCES and at last ACTIVE."""
        return [
            *GCLOUD,
            *("queued-resources", "describe", self.name),
            *(*self.place, "--format=value(state.state)"),
        ]

    def copy(self, source: str, target: str) -> list[str]:
        """Copies a file to all workers' homes."""
        return [
            *GCLOUD,
            *("tpu-vm", "scp", source, f"{self.name}:{target}", *self.place, "--worker=all"),
            *self._ssh_flags(),
        ]

    def ssh(self, command: str, *, worker: str = "all") -> list[str]:
        """Runs the command, quoted for the remote shell, on a worker or on all."""
        return [
            *GCLOUD,
            *("tpu-vm", "ssh", self.name, *self.place, f"--worker={worker}", *self._ssh_flags()),
            f"--command={command}",
        ]

    def delete(self) -> list[str]:
        """Deletes it, and its queued resource."""
        kind = (
            ["queued-resources", "delete", self.name, "--force"]
            if self.queued
            else ["tpu-vm", "delete", self.name]
        )
        return [*GCLOUD, *kind, *self.place]

    def _ssh_flags(self) -> list[str]:
        return ["--internal-ip"] if self.internal_ip else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job on the workers of a TPU VM.

    python: "" where the launcher makes an environment.  repository: a URL that git clones, "" where the code
    of this checkout is sent; revision: its branch or tag.  setup: lines of shell before the packages are installed.
    variables: NAME=VALUE.
    """

    name: str
    python: str = ""
    repository: str = ""
    revision: str = ""
    setup: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    port: int = 8490

    @property
    def folder(self) -> str:
        """On each worker, in the home that commands begin in."""
        return f".pgdist/{self.name}"

    @property
    def archive(self) -> str:
        """The code, on its way."""
        return f"{self.name}.tar.gz"

    def install(self) -> str:
        """The remote command that brings the code and the packages."""
        return _TEMPLATES.get_template("tpu_vm_install.sh.jinja").render(job=self)

    def start(self, submission: Submission) -> str:
        """The remote command that leaves the worker's part of the job running behind."""
        agent = submission.agent_command(f"--job_id={self.name}")
        worker = [
            *self._module(),
            f"--port={self.port}",
            f"--max_restarts={submission.max_restarts}",
            f"--backoff={submission.backoff:g}",
            "--",
            *agent[agent.index("launch.agent") + 1 :],
        ]
        environment = ["env", *self.variables] if self.variables else []
        command = shlex.join(["setsid", "nohup", *environment, *worker])
        return f"{self._enter()} && {{ {command} >>../log 2>&1 </dev/null & }}"

    def ask(self, question: str) -> str:
        """The remote command that asks a worker's part of the job for `status`, ... or to `stop`."""
        return f"{self._enter()} && {shlex.join([*self._module(), f'--ask={question}'])}"

    def log(self, *, skip: int = 0, follow: bool = False) -> str:
        """The remote command that prints a worker's log from byte `skip` on; to the end of the job."""
        folder = shlex.quote(self.folder)
        tail = f"tail --bytes=+{skip + 1}"
        if follow:
            tail += f' --follow=name --retry --pid="$(cat {folder}/pid)"'
        return f"{tail} {folder}/log"

    def _enter(self) -> str:
        return f"cd {shlex.quote(self.folder)}/source"

    def _module(self) -> list[str]:
        python = self.python or "../venv/bin/python"
        return [python, "-m", "launch.targets.tpu_vm_worker", "--folder=.."]


def script(tpu: Tpu, job: Job, submission: Submission) -> str:
    """All of it from nothing to a running job, as a script for the local shell; and in comments, what comes later."""
    return _TEMPLATES.get_template("tpu_vm.sh.jinja").render(
        tpu=tpu,
        job=job,
        line=shlex.join,
        start=job.start(submission),
        later={
            "log": tpu.ssh(job.log(follow=True), worker="0"),
            "status": tpu.ssh(job.ask("status")),
            "save and end": tpu.ssh(job.ask("stop")),
            "delete the TPU": tpu.delete(),
        },
    )
