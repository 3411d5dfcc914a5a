"""One job to start, wherever it is to run: the command of each of its processes, and the rules about failure.

The same for every target, so that a job moves from one to another without changing. What it was started as
stands in its workdir, where `submit status`, `logs` and `cancel` find it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

from launch.job_status import is_running
from pgdist import files
from pgdist.errors import ConfigError

MODULES = ("launch.train", "launch.predict", "launch.env")  # what a job can be
RECORD = "submitted.json"  # in the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """What to run and how long to insist.

    name: letters, digits and dashes; what schedulers call the job.  module: `launch.train` and the like.
    arguments: its flags, as typed.  workdir: "" for a command that has none.  max_restarts: failures after
    which it is given up; preemptions do not count.  backoff: seconds before the first restart, doubled for
    each further one.  grace: seconds between being asked to stop and being killed.  silence: what the agent
    takes as --silence.  detach: return as soon as the job is submitted.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    workdir: str
    max_restarts: int
    backoff: float
    grace: float
    silence: str
    detach: bool

    def agent_command(self, *flags: str, python: str = "python") -> list[str]:
        """The command line of a host's agent.  flags: those of the agent that are the target's affair."""
        own = [f"--workdir={self.workdir}"] if self.workdir else []
        own += [f"--grace={self.grace:g}"] + ([f"--silence={self.silence}"] if self.silence else [])
        return [python, "-m", "launch.agent", *own, *flags, "--", self.module, *self.arguments]

    def check_workdir_is_free(self) -> None:
        """Raises ConfigError where another job runs in the workdir: its record is not to be overwritten."""
        if self.workdir and is_running(self.workdir):
            raise ConfigError(
                f"--workdir={self.workdir} is in use: a job runs in it. `submit status` tells more; wait for its "
                "end, cancel it, or use a new --workdir."
            )

    def record(self, *, target: str, **facts: Any) -> None:
        """Notes in the workdir where the job runs; facts: JSON values by which the target finds it again.

        Raises ConfigError for a workdir that cannot be written.
        """
        if self.workdir:
            path = files.folder(self.workdir)
            record = {"target": target, "name": self.name, "workdir": self.workdir, **facts}
            try:
                path.mkdir(parents=True, exist_ok=True)
                (path / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(
                    f"--workdir={self.workdir}: expected a folder that can be made and written, found: "
                    f"{error.strerror or error}. Name another one."
                ) from error


def read_record(workdir: str) -> dict[str, Any]:
    """What `Submission.record` wrote.  ConfigError where no job was submitted with this workdir."""
    path = files.folder(workdir) / RECORD
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"--workdir={workdir}: no job was submitted with this workdir ({path} is not there)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected what submit wrote, found: {error}") from error


def default_name(workdir: str) -> str:
    """A name that every scheduler takes, from the workdir's: "runs/My cows" -> "pgdist-my-cows"."""
    last = re.sub(r"[^a-z0-9]+", "-", os.path.basename(workdir.rstrip("/")).lower()).strip("-")
    return f"pgdist-{last}"[:40].rstrip("-")
