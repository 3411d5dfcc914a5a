"""Devices, and the job of several processes that this one belongs to

The flags for it that `train` and `predict` share, and what to do with them before anything looks at a device.
"""

from __future__ import annotations

import os
import sys
from typing import IO

from absl import flags

from launch import entry

_FAKE_DEVICES = flags.DEFINE_integer(
    "fake_devices", None, "Simulate so many devices on the CPU.", lower_bound=1
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, in a job of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in the job.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)


def join_job() -> IO[str]:
    """Simulates devices and joins the job as the flags say; neither if they say nothing.

    Returns where answers go: standard output, or in a job of several processes a copy of it, for there the
    communication library of CPUs writes to the first one.
    """
    if _FAKE_DEVICES.value is not None:
        entry.simulate_devices(_FAKE_DEVICES.value)
    from pgdist import cluster  # imports JAX, which --help need not wait for

    cluster.join(
        coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
    )
    if _COORDINATOR.value is None:
        return sys.stdout
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
