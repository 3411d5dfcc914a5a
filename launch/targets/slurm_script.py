"""What a job is to Slurm, the script that `sbatch` takes, and the `srun` command in it."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.submission import Submission
from pgdist.errors import ConfigError

STEP = "pgdist-agents"  # what Slurm calls the step that runs the agents
FIRST_PORT, PORTS = 20000, 12000  # below 32768, where the kernel takes the ports of outgoing connections
_WIDTH = 96  # columns of a line of the script


class Shell(str):
    """Text that the shell is to expand, quoted already."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What to ask Slurm for, in its own words, and what to make of it.

    cpus_per_task: for a node's agent and all of its processes.  gpus_per_node, gres, mem, time, partition, account,
    qos: "" leaves the choice to Slurm.  extra: further options of sbatch.  gpus: whether the agents divide the GPUs
    of their nodes among the processes.  setup: lines of shell that come before.  python: what runs the agents.
    srun_flags: further options of srun.
    """

    nodes: int
    processes_per_node: int
    gpus: bool = False
    gpus_per_node: str = ""
    gres: str = ""
    cpus_per_task: int | None = None
    mem: str = ""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    signal_ahead: int = 0
    extra: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = "python"
    container_image: str = ""
    container_mounts: str = ""
    srun_flags: tuple[str, ...] = ()
    devices_per_process: int | None = None

    def container(self) -> list[str]:
        """The options of srun, by NVIDIA's Pyxis, for what runs in a container."""
        image = [f"--container-image={self.container_image}"] if self.container_image else []
        return image + ([f"--container-mounts={self.container_mounts}"] if self.container_mounts else [])


def render(submission: Submission, resources: Resources) -> str:
    """The script for `sbatch`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    agent = agent_words(
        submission,
        resources,
        hosts=Shell('"$SLURM_JOB_NUM_NODES"'),
        rendezvous=Shell('"$rendezvous"'),
        job_id=Shell('"$SLURM_JOB_ID"'),
    )
    job = agent.index("--")
    return environment.get_template("slurm.sbatch.jinja").render(
        header=_header(submission, resources),
        setup=resources.setup,
        step=STEP,
        first_port=FIRST_PORT,
        ports=PORTS,
        srun=_shell(srun_words(resources, step=STEP), agent[:job], agent[job:], indent=4),
        verdict=_shell(*_verdict_words(submission, resources), indent=2) if submission.workdir else "",
    )


def srun_words(resources: Resources, *, step: str) -> list[str]:
    """The beginning of the command that runs one task a node, up to the command itself."""
    cpus = [f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []
    return [
        "srun",
        f"--job-name={step}",
        "--ntasks-per-node=1",
        *cpus,
        "--cpu-bind=none",  # the agent's processes share all that the job has of the node
        "--kill-on-bad-exit=0",  # when one agent ends, the others may still be saving
        "--wait=0",
        *resources.container(),
        *resources.srun_flags,
    ]


def agent_words(
    submission: Submission, resources: Resources, *, hosts: str, rendezvous: str, job_id: str
) -> list[str]:
    """The agent's command line; on a single node it starts the job again by itself, which is faster."""
    flags = [f"--processes={resources.processes_per_node}"]
    flags += ["--gpus=all"] if resources.gpus else []
    flags += (
        [f"--devices_per_process={resources.devices_per_process}"] if resources.devices_per_process else []
    )
    flags += [_flag("hosts", hosts), _flag("rendezvous", rendezvous), _flag("job_id", job_id)]
    if resources.nodes == 1:
        flags += [f"--max_restarts={submission.max_restarts}", f"--backoff={submission.backoff:g}"]
    return submission.agent_command(*flags, python=resources.python)


def log_folder(submission: Submission) -> str:
    """Where Slurm is to write what the job prints, an absolute path.

    Raises ConfigError for one that Slurm cannot write to.
    """
    if not submission.workdir or "://" in submission.workdir:
        return os.getcwd()
    folder = os.path.join(os.path.abspath(os.path.expanduser(submission.workdir)), "logs")
    if "\\" in folder:
        raise ConfigError(f"{folder}: Slurm writes no log into a folder with a backslash in its name")
    return folder


def log_name(job_id: str) -> str:
    """The file in `log_folder`; Slurm makes it up itself for the job "%j"."""
    return f"slurm-{job_id}.log"


def parse_time(text: str) -> int | None:
    """Seconds of one of Slurm's times; None for no limit and for what is none, about which sbatch will tell."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest
    if days is not None:  # days-hours[:minutes[:seconds]]
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + (second or 0)  # minutes[:seconds]


def _header(submission: Submission, resources: Resources) -> list[str]:
    """The options for sbatch, quoted as it wants them."""
    options = {
        "job-name": submission.name,
        "nodes": str(resources.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(resources.cpus_per_task or ""),
        "gpus-per-node": resources.gpus_per_node,
        "gres": resources.gres,
        "mem": resources.mem,
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "output": os.path.join(log_folder(submission).replace("%", "%%"), log_name("%j")),
        "open-mode": "append",
        "signal": f"B:TERM@{resources.signal_ahead}",
    }
    lines = [f"--{name}={_quote_for_sbatch(value)}" for name, value in options.items() if value]
    return [*lines, "--requeue", *resources.extra]


def _quote_for_sbatch(value: str) -> str:
    """sbatch reads quotes as the shell does, and expands nothing."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _verdict_words(submission: Submission, resources: Resources) -> list[list[str]]:
    here = []
    if resources.container_image:  # where pgdist is
        here = ["srun", "--job-name=pgdist-verdict", "--nodes=1", "--ntasks=1", "--overlap"]
        here += [*resources.container(), *resources.srun_flags]
    command = [
        *(resources.python, "-m", "launch.verdict"),
        f"--workdir={submission.workdir}",
        Shell('--job_id="$SLURM_JOB_ID"'),
        Shell('--code="$code"'),
        f"--max_restarts={submission.max_restarts}",
    ]
    return [here, command] if here else [command]


def _flag(name: str, value: str) -> str:
    flag = f"--{name}={value}"
    return Shell(flag) if isinstance(value, Shell) else flag


def _shell(*commands: Sequence[str], indent: int) -> str:
    """Commands, each an argument of the one before, over as many lines as that takes."""
    lines: list[str] = []
    for command in commands:
        lines.append("")
        for word in (word if isinstance(word, Shell) else shlex.quote(word) for word in command):
            if lines[-1] and len(lines[-1]) + len(word) > _WIDTH:
                lines.append("  ")
            lines[-1] += word if not lines[-1].strip() else f" {word}"
    return (" \\\n" + " " * indent).join(lines)
