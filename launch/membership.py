"""Devices, and the job of several processes that this one belongs to.

The flags for it that the commands share, and what to do with them before anything looks at a device. Where they
say nothing the environment does: PGDIST_COORDINATOR, PGDIST_NUM_PROCESSES, PGDIST_PROCESS_ID,
PGDIST_LOCAL_DEVICE_IDS, PGDIST_FAKE_DEVICES; else the cluster that started this process.
"""

from __future__ import annotations

import os
import sys
from typing import IO

from absl import flags

from launch import entry
from pgdist import backend_flags
from pgdist.detection import HEARTBEAT_TIMEOUT, JOIN_TIMEOUT, Membership, find_membership
from pgdist.errors import ConfigError

_FAKE_DEVICES = flags.DEFINE_integer(
    "fake_devices", None, "Simulate so many devices on the CPU.", lower_bound=1
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, in a job of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes in the job; 1 keeps it from joining any.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
_LOCAL_DEVICE_IDS = flags.DEFINE_string(
    "local_device_ids", None, "The GPUs of this host that are this process's, such as 0,1; all by default."
)
_JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout", JOIN_TIMEOUT, "Seconds in which all processes of the job must come.", lower_bound=1.0
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    HEARTBEAT_TIMEOUT,
    "Seconds without a sign of life that end the others.",
    lower_bound=2,
)


def join_job() -> IO[str]:
    """Tells the backend its flags, simulates devices and joins the job as the flags say, the environment, or the
    cluster.

    Returns where answers go: standard output, or in a job of several processes a copy of it, for there the
    communication library of CPUs writes to the first one.
    """
    _prepare_backend()
    from pgdist import cluster  # imports JAX, which --help need not wait for

    place = cluster.join(
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        local_device_ids=_LOCAL_DEVICE_IDS.value,
        join_timeout=_JOIN_TIMEOUT.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )
    if place.num_processes == 1:
        return sys.stdout
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def stay_alone(*, topology: str) -> IO[str]:
    """Prepares the backend to compile for devices that are only described, such as "v5e:4x4": those of this machine,
    and of its job, are not asked. Returns where answers go.
    """
    backend_flags.apply(f"tpu {topology.partition(':')[0]}")
    entry.simulate_devices(1)
    return sys.stdout


def describe_job() -> Membership:
    """Prepares the backend as `join_job`, and says which job `join_job` would join, and why; joins none."""
    _prepare_backend()
    return find_membership(
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        local_device_ids=_LOCAL_DEVICE_IDS.value,
        timeout=0,
    )


def _prepare_backend() -> None:
    text = os.environ.get("PGDIST_FAKE_DEVICES", "")
    if text and not text.isdecimal():
        raise ConfigError(f"PGDIST_FAKE_DEVICES: expected a whole number, found {text!r}.")
    count = _FAKE_DEVICES.value or int(text or 0)
    # Before JAX is imported, which adds flags of its own.
    backend_flags.apply("cpu" if count else backend_flags.find_kind())
    if count:
        entry.simulate_devices(count)
