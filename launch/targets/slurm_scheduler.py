"""What is asked of Slurm, by its own commands, and what it answers, in words that name our flags."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Sequence

from pgdist.errors import ConfigError

_SETTLE_SECONDS = 2.0  # until Slurm has looked at a new job
_NOT_YET_JUDGED = "PartitionConfig"  # what it says before that, and of some that it will not start
_SECONDS = 120  # for one answer; Slurm's own patience with a busy controller is of that order

# What a job does not come back from by itself.
_ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED "
    "RECONFIG_FAIL REVOKED TIMEOUT UNKNOWN".split()
)

# What sbatch says, the flag that it is about, and what to do.
_REFUSALS = (
    (r"invalid partition", "--partition", "Slurm has no such partition; there are: {partitions}"),
    (r"invalid account", "--account", "Slurm knows no such account, or not for this user and partition"),
    (r"invalid qos", "--qos", "Slurm knows no such QOS, or not for this user"),
    (r"access/permission denied", "--partition", "this user may not submit there"),
    (r"--time|time limit", "--time", "expected a time such as 04:00:00 within the partition's limit"),
    (r"--mem\b|memory specification", "--mem", "expected what a node has, such as 400G"),
    (r"generic resource|gres|gpu", "--gpus_per_node or --gres", "the nodes have no such GPUs, or fewer"),
    (r"cpus-per-task|cpu count", "--cpus_per_task", "expected no more than a node has"),
    (r"node count|too many nodes", "--nodes", "expected no more than the partition has"),
    (
        r"node configuration is not available",
        "--nodes, --cpus_per_task, --mem, --gpus_per_node",
        "no such nodes are there; sinfo --Node --long lists what is",
    ),
    (r"unrecognized option|invalid option", "--sbatch_line", "sbatch has no such option"),
)
_NO_JOB = "Invalid job id specified"
_NO_SLURM = r"configuration source|unable to process configuration"

# What a job waits for that does not come by waiting: Slurm's word, and as above.
_HOPELESS = (
    ("PartitionNodeLimit", "--nodes", "more than the partition has or allows"),
    ("PartitionTimeLimit", "--time", "more than the partition allows"),
    ("BadConstraints", "--sbatch_line", "no node meets these constraints"),
    ("InvalidAccount", "--account", "Slurm knows no such account"),
    ("InvalidQOS", "--qos", "Slurm knows no such QOS"),
    ("AccountNotAllowed", "--account", "not allowed in this partition"),
    ("QOSNotAllowed", "--qos", "not allowed in this partition"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A job in Slurm's eyes.  word: RUNNING, PENDING, ...; UNKNOWN where Slurm has forgotten it.

    reason: why it waits.  code: how its script ended; signal: what killed it, 0 if nothing.
    """

    word: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    code: int = 0
    signal: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.word in _ENDED

    @property
    def is_running(self) -> bool:
        """Whether its script runs, and hears signals."""
        return self.word in ("RUNNING", "SIGNALING", "STOPPED", "SUSPENDED")

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue."""
        return not self.has_ended and not self.is_running and self.word != "COMPLETING"

    def describe(self) -> str:
        """For people: "RUNNING on n[1-2], restart 3"."""
        text = self.word
        if self.is_waiting and self.reason:
            text += f" ({self.reason})"
        if self.nodes and not self.has_ended:
            text += f" on {self.nodes}"
        return text + (f", restart {self.restarts}" if self.restarts else "")


def require_command(name: str) -> None:
    """Raises ConfigError where this machine cannot submit to Slurm."""
    if shutil.which(name) is None:
        raise ConfigError(
            f"no {name} on this machine: run this on a login node of the Slurm cluster; --dry_run prints the "
            "script, which sbatch takes there"
        )


def submit(script: str, *, flags: dict[str, str]) -> str:
    """Hands the script to sbatch; the job's id.

    flags: ours by name, with their values, for the message.  Raises ConfigError with what sbatch refuses.
    """
    require_command("sbatch")
    done = _run(["sbatch", "--parsable"], input=script)
    if done.returncode != 0:
        raise ConfigError(_explain(done.stderr, flags))
    return done.stdout.strip().split(";")[0]  # "4711;cluster" in a federation


def refuse_hopeless(job_id: str, *, flags: dict[str, str]) -> None:
    """Cancels a job that Slurm has taken and will never start, and raises ConfigError that says why."""
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        found = state(job_id)
        for reason, name, what in _HOPELESS:
            if found is not None and found.is_waiting and found.reason == reason:
                cancel(job_id)
                raise ConfigError(
                    f"{name}={flags[name]}: {what} (Slurm says {reason}); job {job_id} is cancelled. "
                    "sinfo lists partitions, their nodes and limits"
                )
        if found is None or found.reason != _NOT_YET_JUDGED or time.monotonic() > end:
            return
        time.sleep(0.5)


def state(job_id: str) -> State | None:
    """What Slurm says of the job; None where it does not answer now."""
    done = _run(["scontrol", "--oneliner", "show", "job", job_id])
    if done.returncode == 0:
        return parse_job(done.stdout)
    if _NO_JOB not in done.stderr:
        return None
    return _from_accounting(job_id) or State(word="UNKNOWN")


def parse_job(text: str) -> State:
    """The line that `scontrol --oneliner show job` prints."""

    def field(name: str, default: str = "") -> str:
        match = re.search(rf"(?:^|\s){name}=(\S*)", text)
        return match[1] if match and match[1] not in ("None", "(null)") else default

    code, _, signal = field("ExitCode", "0:0").partition(":")
    return State(
        word=field("JobState", "UNKNOWN"),
        reason=field("Reason"),
        nodes=field("NodeList"),
        restarts=int(field("Restarts", "0")),
        code=int(code),
        signal=int(signal or 0),
    )


def cancel(job_id: str) -> None:
    """Takes the job from the queue, or ends it at once."""
    _run(["scancel", job_id])


def ask_to_stop(job_id: str) -> None:
    """Sends SIGTERM to the job's script."""
    _run(["scancel", "--batch", "--signal=TERM", job_id])


def signal_step(job_id: str, step: str, signal: str) -> bool:
    """Sends the signal to all tasks of the job's step of that name; whether that was done."""
    listed = _run(["squeue", "--noheader", "--steps", f"--job={job_id}", "--format=%i %j"])
    steps = [line.split()[0] for line in listed.stdout.splitlines() if line.split()[1:] == [step]]
    if not steps:
        return False
    sent = _run(["scancel", f"--signal={signal}", *steps])
    # scancel fails as well when it has signalled all, and the job has nodes on which the step has no task.
    return sent.returncode == 0 or _NO_JOB in sent.stderr


def hostnames(node_list: str) -> list[str]:
    """The nodes in "n[1-4,7]"."""
    return _run(["scontrol", "show", "hostnames", node_list]).stdout.split()


def address(node: str) -> str:
    """Where the node is reached; its name need not resolve."""
    found = re.search(r"\bNodeAddr=(\S+)", _run(["scontrol", "--oneliner", "show", "node", node]).stdout)
    return found[1] if found else node


def _from_accounting(job_id: str) -> State | None:
    """The end of a job that the controller has forgotten, where the cluster keeps accounts."""
    if shutil.which("sacct") is None:
        return None
    done = _run(
        ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode", f"--jobs={job_id}"]
    )
    word, _, ended = (
        done.stdout.strip().splitlines()[-1].partition("|") if done.stdout.strip() else ("", "", "")
    )
    if done.returncode != 0 or not word:
        return None
    code, _, signal = ended.partition(":")
    return State(word=word.split()[0], code=int(code or 0), signal=int(signal or 0))  # "CANCELLED by 1000"


def _run(command: Sequence[str], *, input: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=input, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise ConfigError(f"no {command[0]} on this machine: run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_SECONDS} s")


def _explain(said: str, flags: dict[str, str]) -> str:
    """What sbatch said, behind the flag of ours that it is about."""
    said = said.strip()
    if re.search(_NO_SLURM, said):
        return (
            "sbatch finds no Slurm cluster from this machine: run this on a login node, or set SLURM_CONF. It says: "
            + said
        )
    for pattern, names, advice in _REFUSALS:
        if re.search(pattern, said, re.IGNORECASE):
            given = [f"{name}={flags[name]}" for name in re.findall(r"--\w+", names) if flags.get(name)]
            subject = ", ".join(given) or names
            return f"{subject}: {advice.format(partitions=_partitions())}. sbatch says: {said}"
    return f"sbatch did not take the job. It says: {said}"


def _partitions() -> str:
    listed = _run(["sinfo", "--noheader", "--format=%R"]).stdout.split()
    return ", ".join(dict.fromkeys(listed)) or "none"
