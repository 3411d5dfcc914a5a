"""What becomes of a job of four processes of two simulated devices each when something is done to it.

    python tools/bench/faults.py [--only=WORD] [--json=FILE]

One line a fault: the first attempt's verdict, the seconds from the fault to its detection, the steps that must be
trained again, the processes left behind, and the seconds from the fault to the first new step with their parts:
detection, restart (ending the others, waiting, starting Python), joining and loading, compiling and the first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.local_jobs import LocalJob
from tests.tiny_runs import tiny_config, write_config, write_inputs

PROCESSES = 4
FLAGS = (f"--processes={PROCESSES}", "--devices_per_process=2", "--max_restarts=1", "--backoff=0")
EVERY = 10  # steps between checkpoints
FAULT_STEP = 25

# A mistake in a config file, which is a program: one process fails, after some steps.
_RAISES = """
import os
if os.environ.get("PGDIST_PROCESS_ID") == "3" and os.environ.get("PGDIST_ATTEMPT") == "000":
    from pgdist.train import loop
    fetch = loop.Loop._next_batch
    def fails(self, *arguments, **named):
        fails.calls += 1
        if fails.calls == 25:
            raise RuntimeError("process 3 fails on purpose")
        return fetch(self, *arguments, **named)
    fails.calls = 0
    loop.Loop._next_batch = fails
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """name: in the table.  do: does it to a job that trains, and returns when, seconds since the epoch."""

    name: str
    do: Callable[[LocalJob], float] | None = None
    config_code: str = ""
    overrides: tuple[str, ...] = ()
    expected: tuple[int, ...] = (43,)
    restarts: bool = True


def _signal(process: int, number: signal.Signals) -> Callable[[LocalJob], float]:
    return lambda job: job.send(process, number)


def _kill_agent(job: LocalJob) -> float:
    os.kill(job.agent.pid, signal.SIGKILL)
    return time.time()


def _kill_first_while_saving(job: LocalJob) -> float:
    checkpoints = job.workdir / "checkpoints"
    # Orbax writes into a folder of another name until all is there.
    job.until(lambda: [path for path in checkpoints.iterdir() if not path.name.isdecimal()])
    return job.send(0, signal.SIGKILL)


FAULTS = [
    *(Fault(name=f"SIGKILL of process {n}", do=_signal(n, signal.SIGKILL)) for n in range(PROCESSES)),
    *(Fault(name=f"SIGSTOP of process {n}", do=_signal(n, signal.SIGSTOP)) for n in range(PROCESSES)),
    Fault(name="SIGKILL of process 0 while it saves", do=_kill_first_while_saving),
    Fault(name="SIGKILL of the agent", do=_kill_agent, expected=(-signal.SIGKILL,), restarts=False),
    Fault(name="exception in process 3", config_code=_RAISES, expected=(1,), restarts=False),
    Fault(name="config error in all", overrides=("--config.batch_size=12",), expected=(2,), restarts=False),
]


def measure(fault: Fault, folder: Path) -> dict[str, object]:
    """Does it to a fresh job; the table's line.  AssertionError where the job does not end as expected."""
    inputs = write_inputs(folder / "inputs")
    fields = {"steps": 5000, "checkpoint.every": EVERY, "mesh.data": 2}
    config = write_config(folder / "config.py", tiny_config(inputs, **fields))
    config.write_text(fault.config_code + config.read_text())
    command = ["launch.train", f"--config={config}", f"--workdir={folder / 'run'}", *fault.overrides]
    started = time.time()
    with LocalJob(*FLAGS, command=command, workdir=folder / "run", shares_programs=False) as job:
        at = started
        if fault.do is not None:
            job.wait_for_beat(lambda beat: beat.step >= FAULT_STEP)
            at = fault.do(job)
        row = _measure_restart(fault, job, at) if fault.restarts else _measure_end(fault, job, at)
        return {"fault": fault.name, **row, "orphans": len(job.orphans())}


def _measure_end(fault: Fault, job: LocalJob, at: float) -> dict[str, object]:
    """Of a fault that ends the job for good."""
    code = job.wait(seconds=100)
    assert code in fault.expected, job.tail()
    row: dict[str, object] = {"verdict": 128 - code if code < 0 else code}
    if fault.do is None:
        ended = [line for line in job.host(0)["processes"] if line["end"] == f"ended with code {code}"]
        assert ended, job.host(0)
        assert len(job.attempts()) == 1, job.tail()
        row["whole_run"] = job.verdict(0)["ended"] - at
    return row


def _measure_restart(fault: Fault, job: LocalJob, at: float) -> dict[str, object]:
    """Of a fault after which the job goes on."""
    verdict = job.verdict(0)
    assert verdict["code"] in fault.expected, (verdict, job.tail())
    reached = max(process["step"] for process in job.host(0)["processes"])
    job.until(lambda: job.attempt(1).exists())
    job.until(lambda: "stepping" in job.host(1)["processes"][0]["phases_since"], seconds=100)
    since = job.host(1)["processes"][0]["phases_since"]
    (resumed,) = {int(step) for step in re.findall(r"Resumed from the checkpoint of step (\d+)", job.tail())}
    os.kill(job.agent.pid, signal.SIGTERM)
    assert job.wait(seconds=100) == 42, job.tail()
    return {
        "verdict": verdict["code"],
        "detection": verdict["detected"] - at,
        "steps_lost": reached - resumed,
        "restart": since["starting"] - verdict["detected"],
        "load": since["compiling"] - since["starting"],
        "compile": since["stepping"] - since["compiling"],
        "total": since["stepping"] - at,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    columns = "verdict detection steps_lost orphans total restart load compile".split()
    print(f"{'':36}" + "".join(f"{column:>11}" for column in columns))
    rows = []
    for fault in FAULTS:
        if options.only not in fault.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(fault, Path(folder))
        rows.append(row)
        cells = [row.get(column, "") for column in columns]
        text = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"{fault.name:36}" + "".join(f"{cell:>11}" for cell in text), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
