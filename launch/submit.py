"""Starts a job somewhere, and looks after it: on this machine, on Slurm, Kubernetes, TPU VMs or hosts with ssh.

    python -m launch.submit --to=local --processes=4 -- launch.train --config=... --workdir=runs/x
    python -m launch.submit --to=slurm --nodes=2 --dry_run -- launch.train --config=... --workdir=runs/x
    python -m launch.submit status --workdir=runs/x
    python -m launch.submit logs --follow --workdir=runs/x
    python -m launch.submit cancel --workdir=runs/x

Stays until the job has ended and leaves with its code, unless --detach. Ctrl-C asks the job to save and end, a
second one ends it at once. `--to=TARGET --help` lists the flags of a target. Exit codes: 0 finished, 1 a bug, 2 bad
command line or config, 3 bad data or weights, 4 diverged, 42 stopped with its state saved, 43 a process was lost.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from absl import flags

from launch import entry
from launch.command_line import given_flags, nearest
from launch.job_status import describe_attempts
from launch.submission import MODULES, Submission, default_name, read_record
from pgdist.errors import ConfigError

TARGETS = {
    "local": "this machine",
    "slurm": "a Slurm cluster",
    "jobset": "Kubernetes, by a JobSet",
    "tpu_vm": "TPU VMs of Google Cloud",
    "ssh": "hosts that ssh reaches",
}
ACTIONS = ("status", "logs", "cancel")

_TO = flags.DEFINE_enum("to", None, list(TARGETS), "Where to start the job.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be run or applied, and do nothing.")
_NAME = flags.DEFINE_string("name", None, "What schedulers call the job; by default after the workdir.")
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 10, "Failures to start the job again after; preemptions do not count.", lower_bound=0
)
_BACKOFF = flags.DEFINE_float(
    "backoff", 5, "Seconds before the first restart; doubles with each failure.", lower_bound=0
)
_GRACE = flags.DEFINE_float("grace", 120, "Seconds to save and end in, once asked to.", lower_bound=1)
_SILENCE = flags.DEFINE_string(
    "silence", "", "Seconds without a sign of life that count as hung, such as stepping=60,saving=300."
)
_DETACH = flags.DEFINE_bool("detach", False, "Return as soon as the job is submitted.")
_WORKDIR = flags.DEFINE_string("workdir", None, "With status, logs, cancel: the job's workdir.")
_FOLLOW = flags.DEFINE_bool("follow", False, "With logs: go on until the job has ended.")


def main(*words: str) -> None:
    """Does what the first word says, or starts the job that the words after `--` are."""
    if words and words[0] in ACTIONS and len(words) == 1:
        _act(words[0])
        return
    entry.require("to")
    submission = _submission(words)
    target = _target(_TO.value)
    if _DRY_RUN.value:
        print(target.dry_run(submission), end="")
        return
    if not hasattr(target, "find"):  # else the workdir is not to be seen from here
        submission.check_workdir_is_free()
    sys.exit(target.start(submission))


def _act(action: str) -> None:
    record = _record()
    target = _target(record["target"])
    if action == "status":
        attempts = describe_attempts(record["workdir"]) if record.get("workdir") else ""
        print("\n".join(filter(None, [target.status(record).rstrip(), attempts])))
    elif action == "logs":
        target.logs(record, follow=_FOLLOW.value)
    else:
        target.cancel(record)


def _record() -> dict[str, Any]:
    """What is known of the job: from its workdir, or from a target whose workdirs only its machines see."""
    if _TO.value and hasattr(target := _target(_TO.value), "find"):
        if not (_NAME.value or _WORKDIR.value):
            raise ConfigError(
                f"--to={_TO.value} finds a job by its name: give --name, or the --workdir it was made of"
            )
        return target.find(_NAME.value or default_name(_WORKDIR.value))
    if not _WORKDIR.value:
        raise ConfigError("--workdir must be given; or --to and --name of a job on Kubernetes or TPU VMs")
    return read_record(_WORKDIR.value)


def _submission(words: tuple[str, ...]) -> Submission:
    """The job that the words after `--` are.  Raises ConfigError for what no target could run."""
    if not words:
        raise ConfigError(
            "give the command to run after --, as in: ... -- launch.train --config=... --workdir=..."
        )
    module = words[0] if words[0].startswith("launch.") else f"launch.{words[0]}"
    if module not in MODULES:
        near = nearest(module, MODULES)
        raise ConfigError(
            f"expected a command after --, one of {', '.join(MODULES)}, found {words[0]!r}"
            + (f"; did you mean {near}?" if near else "")
        )
    given = given_flags(words[1:])
    workdirs = [flag.value for flag in given if flag.name == "workdir"]
    if module == "launch.train" and not (workdirs and workdirs[-1]):
        raise ConfigError("--workdir must be given to launch.train: what is restarted goes on from it")
    for flag in given:
        if flag.name in ("coordinator", "num_processes", "process_id"):
            raise ConfigError(f"--{flag.name} after --: the agents say that to each process")
    workdir = workdirs[-1] if workdirs else ""
    return Submission(
        name=_NAME.value or default_name(workdir or module),
        module=module,
        arguments=words[1:],
        workdir=workdir or "",
        max_restarts=_MAX_RESTARTS.value,
        backoff=_BACKOFF.value,
        grace=_GRACE.value,
        silence=_SILENCE.value,
        detach=_DETACH.value,
    )


def _target(name: str) -> ModuleType:
    return importlib.import_module(f"launch.targets.{name}")


def _define_flags_of_target(arguments: list[str]) -> None:
    """Imports the target, for its flags: only after that can the command line be parsed."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in given_flags(own):
        if flag.name == "to" and flag.value in TARGETS:
            _target(flag.value)


def _action_last(arguments: list[str]) -> list[str]:
    """`status --workdir=W` with its word behind the flags, where absl looks for words."""
    if arguments and arguments[0] in ACTIONS:
        return [*arguments[1:], "--", arguments[0]]
    return arguments


if __name__ == "__main__":
    _define_flags_of_target(sys.argv[1:])
    sys.argv[1:] = _action_last(sys.argv[1:])
    entry.run(main, name="submit", usage=__doc__, positional="-- COMMAND [flags]")
