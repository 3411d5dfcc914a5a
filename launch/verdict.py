"""Says how a job ended, in one code, and whether it is to be started again.

    python -m launch.verdict --workdir=runs/x --job_id=4711 --code=43 --max_restarts=10

For the script that a scheduler runs: prints `restart` or `end`, the reason on standard error, and exits with
the job's code. A preemption (42) uses up no restart; 0, 1, 2, 3, 4 and a cancelled job end it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

from absl import flags

from launch import entry
from launch.attempts import Attempts

FINISHED, BUG, PREEMPTED, PEER_LOST = 0, 1, 42, 43
ABORTED = 134  # how JAX ends a process whose peer is gone

_LONGEST_BACKOFF = 300.0  # seconds

# Starting again does not help against these, the likeliest to be the cause of the others first.
PERMANENT = (2, 3, 4, BUG)


def verdict(codes: Iterable[int]) -> int:
    """The code of a job whose processes, on all its hosts, ended with `codes`."""
    found = {PEER_LOST if code == ABORTED else code for code in codes}
    for code in PERMANENT:
        if code in found:
            return code
    if unknown := [code for code in found if 0 < code < 128 and code not in (PREEMPTED, PEER_LOST)]:
        return min(unknown)  # no code of ours: as permanent as a bug
    if found <= {FINISHED}:
        return FINISHED
    if found <= {FINISHED, PREEMPTED}:
        return PREEMPTED
    # One that was lost in the middle of a save leaves none: it takes all of them to be preempted.
    return PEER_LOST if found & {FINISHED, PREEMPTED, PEER_LOST} else max(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """restart: whether to start the job again.  failures: those so far, this one included."""

    restart: bool
    code: int
    failures: int
    reason: str


def decide(*, workdir: str, job_id: str, code: int, max_restarts: int) -> Decision:
    """Whether a job that ended with `code` is started again; counts it in the workdir.

    code: what the agent or the scheduler reports, for a job that could not leave a verdict of its own.
    """
    attempts = Attempts(workdir)
    found = _new_verdict(attempts, job_id)
    code = found.get("code", code)
    reason = found.get("reason", f"ended with code {code}")
    if attempts.is_cancelled(job_id=job_id):
        return Decision(restart=False, code=code, failures=0, reason=f"cancelled: {reason}")
    if not is_restartable(code):
        return Decision(restart=False, code=code, failures=0, reason=reason)
    failures = attempts.count_restart(job_id=job_id, failed=code != PREEMPTED)
    if code == PREEMPTED:
        return Decision(restart=True, code=code, failures=failures, reason=reason)
    if failures > max_restarts:
        reason += f"; given up after {max_restarts} restarts"
        return Decision(restart=False, code=code, failures=failures, reason=reason)
    return Decision(
        restart=True, code=code, failures=failures, reason=f"{reason}; restart {failures} of {max_restarts}"
    )


def is_restartable(code: int) -> bool:
    """Whether a job that ended with the code may do better the next time."""
    return code in (PREEMPTED, PEER_LOST) or code >= 128


def backoff_seconds(first: float, failures: int) -> float:
    """How long to wait after so many failures: `first`, doubled with each further one, at most 5 minutes."""
    return min(_LONGEST_BACKOFF, first * 2 ** (failures - 1))


def _new_verdict(attempts: Attempts, job_id: str) -> dict[str, Any]:
    """The verdict of the job's last attempt; {} where it left none, or was decided upon already.

    A try that ends before it has begun an attempt must not be judged by the attempt before it.
    """
    newest = attempts.newest()
    if newest is None or newest.lease().get("job_id") != job_id or not attempts.is_new(newest, job_id=job_id):
        return {}
    return newest.verdict()


def main() -> None:
    """Reads the flags, decides, says so."""
    entry.require("workdir", "job_id", "code")
    decision = decide(
        workdir=_WORKDIR.value, job_id=_JOB_ID.value, code=_CODE.value, max_restarts=_MAX_RESTARTS.value
    )
    print(f"pgdist: code {decision.code}: {decision.reason}", file=sys.stderr)
    print("restart" if decision.restart else "end")
    sys.exit(decision.code)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    _JOB_ID = flags.DEFINE_string("job_id", None, "The job, as its agents were told.")
    _CODE = flags.DEFINE_integer("code", None, "How its agents, or what started them, ended.")
    _MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 10, "Failures to start again after.", lower_bound=0)
    entry.run(main, name="verdict", usage=__doc__)
