"""Which process of which job this one is: as its flags say, else our variables, else the cluster it runs in.

JAX knows Slurm, Open MPI, Kubernetes and TPU pods. It is asked only where one of them has started more than one
process, and only for what it is sure of: an interactive shell inside a Slurm job is no process of the job.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from absl import logging

from pgdist.errors import ConfigError

JOIN_TIMEOUT = 300.0  # seconds: machines of one job may come up minutes apart

# Seconds. A lost process must end the others within ten; JAX ends them after up to this long (measured: 7.2 to
# 8.0). The threads that send the signs of life wait for no Python, so that only a machine which stands still
# this long is taken for lost.
HEARTBEAT_TIMEOUT = 8

_SPECIAL_SLURM_STEPS = 0xFFFFFFF0  # from here on: batch script, interactive shell, ... (slurm.h)
_NAMES = {
    "SlurmCluster": "a Slurm step",
    "OmpiCluster": "Open MPI",
    "K8sCluster": "a Kubernetes job",
    "GkeTpuCluster": "a TPU slice in Kubernetes",
    "GceTpuCluster": "a TPU slice",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """The place of this process in its job.

    coordinator: "host:port" of process 0; "" in a job of one process.  local_device_ids: the devices of this
    host that are its own; None for all.  why: what this follows from, for people.
    """

    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    local_device_ids: tuple[int, ...] | None = None
    why: str


def find_membership(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: str | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> Membership:
    """The place of this process.  The arguments are what its flags say, None where they say nothing.

    timeout: seconds that JAX may wait for the coordinator's name in a cluster that it detects.
    Raises ConfigError when only some of the values are given, or they cannot be true.
    """
    by_flag = any(value is not None for value in (coordinator, num_processes, process_id))
    given: dict[str, Any] = {
        "coordinator": coordinator or os.environ.get("PGDIST_COORDINATOR") or None,
        "num_processes": num_processes if num_processes is not None else _number("PGDIST_NUM_PROCESSES"),
        "process_id": process_id if process_id is not None else _number("PGDIST_PROCESS_ID"),
    }
    devices = _device_ids(local_device_ids or os.environ.get("PGDIST_LOCAL_DEVICE_IDS", ""))
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given) and given["num_processes"] != 1:
        if missing:
            raise ConfigError(
                f"--{' and --'.join(missing)} missing: a job of several processes needs "
                "--coordinator=HOST:PORT, --num_processes=N and, different in each process, "
                "--process_id=0..N-1 (or PGDIST_COORDINATOR, PGDIST_NUM_PROCESSES, PGDIST_PROCESS_ID)."
            )
        split_address(given["coordinator"])
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ConfigError(
                f"--process_id: expected 0 to {given['num_processes'] - 1} (--num_processes="
                f"{given['num_processes']}), found {given['process_id']}."
            )
        why = "flags" if by_flag else "PGDIST_ variables"
        return Membership(**given, local_device_ids=devices, why=why)
    if given["num_processes"] == 1:
        return Membership(local_device_ids=devices, why="told to be the only process")
    if "PGDIST_ATTEMPT" in os.environ:
        return Membership(local_device_ids=devices, why="the only process of its agent's job")
    found = _detect(timeout=timeout)
    return found if devices is None else dataclasses.replace(found, local_device_ids=devices)


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: expected HOST:PORT, such as 10.0.0.1:8476, found {address!r}.")
    return host.strip("[]"), int(port)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{variable}: expected a whole number, found {text!r}.")
    return int(text) if text else None


def _device_ids(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--local_device_ids: expected numbers such as 0,1, found {text!r}.")
    return tuple(map(int, text.split(",")))


def _detect(*, timeout: float) -> Membership:
    """What JAX finds out about the cluster that has started this process."""
    kind = _cluster_kind()
    if kind is None:
        return Membership(why="no flags, no PGDIST_ variables, no cluster that JAX knows")
    name = _NAMES.get(kind.__name__, kind.__name__)
    try:
        count = kind.get_process_count()
        if count == 1:
            return Membership(why=f"{name} of one process")
        logging.info("Started by %s of %d processes.", name, count)
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return Membership(
            coordinator=os.environ.get("JAX_COORDINATOR_ADDRESS")
            or kind.get_coordinator_address(timeout_secs=round(timeout), override_coordinator_port=port),
            num_processes=count,
            process_id=kind.get_process_id(),
            local_device_ids=_share_of_devices(kind),
            why=name,
        )
    except (
        Exception
    ) as error:  # a missing permission or variable, a metadata server that does not answer, ...
        raise ConfigError(
            f"started by {name}, but this process's place in it cannot be found out: {error}. Give --coordinator, "
            "--num_processes and --process_id; --num_processes=1 if it is alone."
        ) from error


def _cluster_kind() -> Any | None:
    """JAX's class for the cluster that this process was started by; None without one."""
    try:
        from jax._src.clusters import ClusterEnv

        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    except (ImportError, AttributeError):  # it has no public name
        logging.warning("This JAX does not tell which clusters it detects: give --coordinator and the like.")
        return None
    return next((kind for kind in kinds if _may_be(kind) and kind.is_env_present()), None)


def _may_be(kind: Any) -> bool:
    """Whether JAX should be asked about this kind of cluster."""
    if kind.__name__ == "SlurmCluster":
        return int(os.environ.get("SLURM_STEP_ID", "0")) < _SPECIAL_SLURM_STEPS
    # Every pod, a notebook too, sees that it is in Kubernetes; only processes of a job have a number.
    return kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ


def _share_of_devices(kind: Any) -> tuple[int, ...] | None:
    """The local devices for one of several processes that a cluster has started on this host.

    JAX would take the one with the process's number; here one process alone takes all of them, and several
    share what CUDA_VISIBLE_DEVICES names evenly, unless each was given its own already.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    local_id = None if running_in_cloud_tpu_vm else kind.get_local_process_id()
    if local_id is None or (local_count := _processes_on_this_host()) == 1:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not local_count:
        return (local_id,)
    share, rest = divmod(len(visible.split(",")), local_count)
    if not share:
        return None
    return (local_id,) if rest else tuple(range(local_id * share, (local_id + 1) * share))


def _processes_on_this_host() -> int:
    """As Open MPI or Slurm tells it, such as "2(x3),1" for four hosts; 0 where nobody does."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 0
