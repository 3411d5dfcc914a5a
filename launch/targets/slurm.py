"""A Slurm cluster: a batch job with one agent a node, put back into the queue until it is done.

    python -m launch.submit --to=slurm --nodes=2 --gpus_per_node=8 --one_process_per_gpu --time=04:00:00 \\
        --setup='source .venv/bin/activate' -- launch.train --config=... --workdir=/shared/runs/x

Inside an allocation (salloc) and without --nodes, the job runs in it at once.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags

from launch import attached
from launch.attempts import Attempts
from launch.job_status import follow_logs
from launch.submission import Submission, read_record
from launch.targets import slurm_allocation
from launch.targets import slurm_scheduler as slurm
from launch.targets.slurm_follow import INTERVAL, Follower, Tail
from launch.targets.slurm_script import Resources, log_folder, log_name, parse_time, render
from pgdist.errors import ConfigError

_NODES = flags.DEFINE_integer("nodes", None, "Nodes; by default 1, in an allocation all.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes_per_node", 1, "Processes on each node.", lower_bound=1)
_PER_GPU = flags.DEFINE_bool("one_process_per_gpu", False, "As many processes on each node as it has GPUs.")
_GPUS_PER_NODE = flags.DEFINE_string("gpus_per_node", "", "GPUs of each node: 8, or with a type a100:8.")
_GRES = flags.DEFINE_string("gres", "", "The same for clusters that want it this way: gpu:8.")
_CPUS = flags.DEFINE_integer("cpus_per_task", None, "CPUs of each node.", lower_bound=1)
_MEM = flags.DEFINE_string("mem", "", "Memory of each node, such as 400G; 0 for all of it.")
_TIME = flags.DEFINE_string("time", "", "Time limit of one try, such as 04:00:00; the job outlives it.")
_PARTITION = flags.DEFINE_string("partition", "", "Slurm's partition.")
_ACCOUNT = flags.DEFINE_string("account", "", "Slurm's account.")
_QOS = flags.DEFINE_string("qos", "", "Slurm's quality of service.")
_SBATCH_LINES = flags.DEFINE_multi_string("sbatch_line", [], "A further option of sbatch: '--exclusive'.")
_SRUN_FLAGS = flags.DEFINE_multi_string("srun_flag", [], "A further option of srun: '--network=...'.")
_SETUP = flags.DEFINE_multi_string(
    "setup", [], "A line of shell to run on the first node before all else: 'source .venv/bin/activate'."
)
_PYTHON = flags.DEFINE_string(
    "python", None, "The Python that has pgdist, on all nodes; by default this one, after --setup `python`."
)
_IMAGE = flags.DEFINE_string("container_image", "", "Image in which the agents run (needs Pyxis).")
_MOUNTS = flags.DEFINE_string("container_mounts", "", "Folders for the container, as SOURCE:PLACE,....")
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", None, "Simulate so many CPU devices in each process.", lower_bound=1
)
_SIGNAL_AHEAD = flags.DEFINE_integer(
    "signal_ahead",
    None,
    "Seconds before the time limit at which the job is to save; by default --grace and a minute.",
    lower_bound=1,
    upper_bound=65535,
)
_IN_ALLOCATION = flags.DEFINE_bool(
    "in_allocation", False, "Run at once in the allocation that this shell is in, on its first --nodes."
)


def dry_run(submission: Submission) -> str:
    """The script for sbatch; in an allocation the srun command."""
    resources = _resources(submission)
    if _is_in_allocation():
        return slurm_allocation.describe(submission, resources)
    return render(submission, resources)


def start(submission: Submission) -> int:
    """Submits the job and, unless detached, follows it to its end; its code."""
    resources = _resources(submission)
    if _is_in_allocation():
        if submission.detach:
            raise ConfigError("--detach: a job in an allocation runs here, and ends with this command")
        return slurm_allocation.run(submission, resources)
    script = render(submission, resources)
    slurm.require_command("sbatch")
    folder = Path(log_folder(submission))
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_second(submission)
    job_id = slurm.submit(script, flags=_given())
    slurm.refuse_hopeless(job_id, flags=_given())
    log = folder / log_name(job_id)
    submission.record(target="slurm", job_id=job_id, log=str(log))
    print(f"pgdist: Slurm has it as job {job_id}; its log is {log}", file=sys.stderr)
    return 0 if submission.detach else _follow(submission.workdir, job_id=job_id, log=log)


def status(record: dict[str, Any]) -> str:
    """What Slurm says of the job, in a line."""
    if "allocation" in record:
        return f"started in allocation {record['allocation']}"
    state = slurm.state(record["job_id"])
    if state is None:
        return f"job {record['job_id']}: Slurm does not answer"
    return f"job {record['job_id']}: {state.describe()}"


def logs(record: dict[str, Any], *, follow: bool) -> None:
    """Prints what the job has printed so far; with `follow` until it has ended."""
    if "allocation" in record:
        follow_logs(record["workdir"], follow=follow)
    elif follow:
        Follower(record["job_id"], Path(record["log"])).follow()
    elif not Tail(Path(record["log"])).show():
        raise ConfigError(f"no log yet. {status(record)}")


def cancel(record: dict[str, Any]) -> None:
    """Asks the job to save and end; the second time ends it at once."""
    job_id = record["job_id"]
    attempts = Attempts(record["workdir"])
    again = attempts.is_cancelled(job_id=job_id)
    attempts.cancel(job_id=job_id)  # first, or what ends now would go back into the queue
    if "allocation" in record:
        step = slurm_allocation.step_of(job_id)
        if not slurm.signal_step(record["allocation"], step, "KILL" if again else "TERM"):
            raise ConfigError(f"--workdir={record['workdir']}: no job runs in it")
    elif not _stop(job_id, again=again):
        raise ConfigError(f"--workdir={record['workdir']}: job {job_id} has ended already")
    what = "ending" if again else "asked to save and end; `cancel` once more ends it at once"
    print(f"pgdist: job {job_id} is {what}", file=sys.stderr)


def _refuse_second(submission: Submission) -> None:
    """Two jobs that wait with one workdir: the second would be refused only once it runs."""
    try:
        record = read_record(submission.workdir) if submission.workdir else {}
    except ConfigError:
        return
    if record.get("target") != "slurm" or "allocation" in record:
        return
    state = slurm.state(record["job_id"])
    if state is not None and not state.has_ended:
        raise ConfigError(
            f"--workdir={submission.workdir}: job {record['job_id']} was submitted with it and is "
            f"{state.describe()}; cancel it first: python -m launch.submit cancel --workdir=..."
        )


def _given() -> dict[str, str]:
    """Our flags as they were typed, for messages."""
    values = {flag.name: flag.value for flag in flags.FLAGS.get_flags_for_module(__name__)}
    return {
        f"--{name}": " ".join(value) if isinstance(value, list) else str(value or "")
        for name, value in values.items()
    }


def _is_in_allocation() -> bool:
    if _IN_ALLOCATION.value and not slurm_allocation.node_count():
        raise ConfigError(
            "--in_allocation: this shell is in none; get one with salloc, or leave the flag out"
        )
    return _IN_ALLOCATION.value or (_NODES.value is None and slurm_allocation.node_count() > 0)


def _resources(submission: Submission) -> Resources:
    """What the flags say.  Raises ConfigError for what cannot be."""
    in_allocation = _is_in_allocation()
    nodes = _NODES.value or (slurm_allocation.node_count() if in_allocation else 1)
    if in_allocation and nodes > slurm_allocation.node_count():
        raise ConfigError(f"--nodes={nodes}: the allocation has {slurm_allocation.node_count()}")
    ahead = _SIGNAL_AHEAD.value or int(submission.grace) + 60
    _check_times(submission, ahead)
    _check_lines()
    if _IMAGE.value and submission.workdir and not re.match(r"/|\w+://", submission.workdir):
        raise ConfigError(f"--workdir={submission.workdir}: with --container_image give an absolute path")
    asks_for_gpus = bool(_GPUS_PER_NODE.value) or "gpu" in _GRES.value
    return Resources(
        nodes=nodes,
        processes_per_node=_gpu_count() if _PER_GPU.value else _PROCESSES.value,
        gpus=asks_for_gpus or (in_allocation and slurm_allocation.has_gpus()),
        gpus_per_node=_GPUS_PER_NODE.value,
        gres=_GRES.value,
        cpus_per_task=_CPUS.value,
        mem=_MEM.value,
        time=_TIME.value,
        partition=_PARTITION.value,
        account=_ACCOUNT.value,
        qos=_QOS.value,
        signal_ahead=ahead,
        extra=tuple(line.removeprefix("#SBATCH").strip() for line in _SBATCH_LINES.value),
        setup=tuple(_SETUP.value),
        python=_PYTHON.value or ("python" if _SETUP.value or _IMAGE.value else sys.executable),
        container_image=_IMAGE.value,
        container_mounts=_MOUNTS.value,
        srun_flags=tuple(_SRUN_FLAGS.value),
        devices_per_process=_DEVICES.value,
    )


def _gpu_count() -> int:
    """GPUs of each node.  ConfigError where the flags do not say."""
    if _PROCESSES.present:
        raise ConfigError("--processes_per_node and --one_process_per_gpu: give one of them")
    asked = _GPUS_PER_NODE.value or _GRES.value or os.environ.get("SLURM_GPUS_ON_NODE", "")
    if match := re.fullmatch(r"(?:gres[:/])?(?:gpu:)?(?:[^:,()\d][^:,()]*:)?(\d+)(?:\(.*\))?", asked):
        return int(match[1])
    raise ConfigError(
        f"--one_process_per_gpu: expected --gpus_per_node=N or --gres=gpu:N beside it, found {asked!r}"
    )


def _check_times(submission: Submission, ahead: int) -> None:
    if ahead < submission.grace:
        raise ConfigError(
            f"--signal_ahead={ahead}: the time limit would cut off the --grace={submission.grace:g} s in which "
            "processes save; give more, or less --grace"
        )
    limit = parse_time(_TIME.value)
    if limit is not None and limit <= ahead + 60:  # Slurm may send the signal a minute early
        raise ConfigError(
            f"--time={_TIME.value}: the job would be stopped to save as soon as it runs, {ahead} s "
            "(--signal_ahead) before that; give more than a minute beside it"
        )


def _check_lines() -> None:
    """Nothing may end a line of the script before its time."""
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        for value in values:
            if flag.name != "setup" and re.search(r"[\n\r\0]", str(value)):
                raise ConfigError(f"--{flag.name}={value!r}: expected one line")
    for line in _SBATCH_LINES.value:
        if not line.removeprefix("#SBATCH").strip().startswith("-"):
            raise ConfigError(f"--sbatch_line={line!r}: expected an option of sbatch, such as --exclusive")


def _stop(job_id: str, *, again: bool) -> bool:
    """Asks a running job to save and end, takes another one from the queue; whether there was one."""
    state = slurm.state(job_id)
    if state is not None and state.has_ended:
        return False
    if again or (state is not None and not state.is_running):
        slurm.cancel(job_id)
    else:
        slurm.ask_to_stop(job_id)
    return True


def _follow(workdir: str, *, job_id: str, log: Path) -> int:
    follower = Follower(job_id, log)

    def stop() -> None:
        if workdir:
            Attempts(workdir).cancel(job_id=job_id)
        _stop(job_id, again=False)

    attached.watch(
        is_running=follower.is_running,
        show=follower.show,
        stop=stop,
        kill=lambda: slurm.cancel(job_id),
        interval=INTERVAL,
    )
    return _code(workdir, job_id=job_id, state=follower.state)


def _code(workdir: str, *, job_id: str, state: slurm.State) -> int:
    """The job's verdict, by its script's code or else by what its agents wrote."""
    if state.code or state.word == "COMPLETED":
        return state.code
    newest = Attempts(workdir).newest() if workdir else None
    if newest is not None and newest.lease().get("job_id") == job_id and (verdict := newest.verdict()):
        return verdict["code"]
    print(f"pgdist: error: Slurm ended the job: {state.word}", file=sys.stderr)
    return 128 + (state.signal or 15)
