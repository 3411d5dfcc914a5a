"""Kubernetes: a JobSet of TPU slices, GPU nodes or CPU nodes, with one agent a pod.

`jobset_manifest.py` says what is applied. Everything is asked of `kubectl`, in the context that it is in or
that --context names.
"""

from __future__ import annotations

import json
import posixpath
import sys
from typing import Any

from absl import flags

from launch import attached
from launch.submission import Submission
from launch.targets import kubectl
from launch.targets.jobset_follow import Follower
from launch.targets.jobset_manifest import LABEL, Pods, jobset, render
from launch.targets.kubernetes_values import (
    check_image,
    check_job_name,
    check_label,
    check_label_value,
    check_quantity,
    check_subdomain,
    read_node_selector,
    read_tolerations,
    read_variables,
    read_volumes,
)
from launch.targets.tpu_slices import read_slice
from pgdist.errors import ConfigError

_IMAGE = flags.DEFINE_string("image", None, "Container image with pgdist in it; the Dockerfile makes one.")
_TPU = flags.DEFINE_string("tpu", None, "TPU slices: generation and topology, such as v5e:4x4.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many of them train together.", lower_bound=1)
_CHIPS_PER_HOST = flags.DEFINE_integer(
    "chips_per_host", 0, "For topologies that exist on two kinds of hosts (v5e:2x4, v6e:2x4): 4 or 8.", 0
)
_GPU = flags.DEFINE_string(
    "gpu",
    None,
    "GPU nodes: what GKE calls their GPUs, such as nvidia-h100-80gb; `any` sets no node selector.",
)
_GPUS_PER_NODE = flags.DEFINE_integer("gpus_per_node", 8, "GPUs for each pod.", lower_bound=1)
_NODES = flags.DEFINE_integer("nodes", 1, "GPU or CPU nodes, one pod each.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer(
    "processes_per_node", 1, "Processes on each, which share its GPUs.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", None, "Simulated devices of each, on CPU nodes.", lower_bound=1
)
_CPU = flags.DEFINE_string("cpu", None, "CPUs that each pod requests.")
_MEMORY = flags.DEFINE_string("memory", None, "Memory that each pod requests, such as 64Gi.")
_SHM = flags.DEFINE_string("shm", "", "Limit of /dev/shm, such as 16Gi; without one, the node's memory.")
_NAMESPACE = flags.DEFINE_string("namespace", "", "Namespace, if not the context's.")
_CONTEXT = flags.DEFINE_string("context", "", "Context of kubectl's configuration, if not the current one.")
_QUEUE = flags.DEFINE_string("queue", "", "Kueue's local queue, where Kueue decides when jobs start.")
_SERVICE_ACCOUNT = flags.DEFINE_string("service_account", "", "Kubernetes service account of the pods.")
_SPOT = flags.DEFINE_bool("spot", False, "On GKE's spot nodes.")
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; may be repeated.")
_SECRET_ENV = flags.DEFINE_multi_string(
    "secret_env", [], "NAME=SECRET:KEY, a variable from a Secret; may be repeated."
)
_NODE_SELECTOR = flags.DEFINE_multi_string("node_selector", [], "LABEL=VALUE of nodes; may be repeated.")
_TOLERATION = flags.DEFINE_multi_string("toleration", [], "KEY[=VALUE][:EFFECT]; may be repeated.")
_VOLUME = flags.DEFINE_multi_string(
    "volume", [], "CLAIM:/PATH or gs://BUCKET:/PATH, mounted in every pod; may be repeated."
)

_CHECK_SECONDS = 3.0  # between two looks at an attached job

_SPOT_LABEL = {"cloud.google.com/gke-spot": "true"}
_SPOT_TOLERATION = {
    "key": "cloud.google.com/gke-spot",
    "operator": "Equal",
    "value": "true",
    "effect": "NoSchedule",
}


def dry_run(submission: Submission) -> str:
    """The manifest."""
    return render(_manifest(submission))


def start(submission: Submission) -> int:
    """Creates the JobSet; attached, follows its first host's log until it has ended.

    A finished JobSet of the same name is deleted first, one that is not finished is a ConfigError.
    """
    manifest = _manifest(submission)
    record = find(submission.name)
    _make_room(record)
    kubectl.run(record, "create", "-f", "-", text=json.dumps(manifest))
    print(
        f"pgdist: created jobset/{submission.name}; --to=jobset --name={submission.name} finds it again",
        file=sys.stderr,
    )
    if submission.detach:
        return 0
    with Follower(record) as follower:

        def stop() -> None:
            follower.expect_deletion()
            cancel(record)

        attached.watch(
            is_running=follower.is_running,
            show=follower.show,
            stop=stop,
            kill=lambda: _kill(record),
            interval=_CHECK_SECONDS,
        )
        return follower.code()


def find(name: str) -> dict[str, Any]:
    """The record of the job of that name; its workdir, which only the pods can see, holds none."""
    return {"target": "jobset", "name": name, "namespace": _NAMESPACE.value, "context": _CONTEXT.value}


def status(record: dict[str, Any]) -> str:
    """State, restarts, and the pods with what they wait for."""
    found = kubectl.get(record, "jobset", record["name"])
    if not found:
        return ""
    state = found.get("status", {})
    terminal = state.get("terminalState") or ("Suspended" if found["spec"].get("suspend") else "Running")
    counted = state.get("restartsCountTowardsMax", 0)
    lines = [
        f"jobset/{record['name']}: {terminal}, {state.get('restarts', 0)} restarts, {counted} of them of "
        f"{found['spec']['failurePolicy'].get('maxRestarts', 0)} after failures"
    ]
    lines += [
        f"  {condition['type']}: {condition.get('message', '')}"
        for condition in state.get("conditions", [])
        if condition["status"] == "True"
    ]
    pods = kubectl.get_all(record, "pods", f"{LABEL}={record['name']}")
    return "\n".join(lines + [f"  {kubectl.describe_pod(pod)}" for pod in pods])


def logs(record: dict[str, Any], *, follow: bool = False) -> None:
    """Prints what all pods print, each line with its pod's name."""
    options = ["--prefix", "--tail=-1", "--max-log-requests=1000", "--ignore-errors"]
    options += ["--follow"] if follow else []
    kubectl.show(record, "logs", f"--selector={LABEL}={record['name']}", *options)


def cancel(record: dict[str, Any]) -> None:
    """Deletes the JobSet: its pods get their grace period to save and end."""
    kubectl.run(
        record,
        "delete",
        "jobset",
        record["name"],
        "--cascade=foreground",
        "--wait=false",
        "--ignore-not-found",
    )


def _kill(record: dict[str, Any]) -> None:
    """Deletes the pods as well, at once."""
    cancel(record)
    selector = f"--selector={LABEL}={record['name']}"
    kubectl.run(record, "delete", "pods", selector, "--grace-period=0", "--force", "--wait=false")


def _make_room(record: dict[str, Any]) -> None:
    """Deletes a finished JobSet of the name."""
    found = kubectl.get(record, "jobset", record["name"])
    if not found:
        return
    if not found.get("status", {}).get("terminalState"):
        raise ConfigError(
            f"--name={record['name']}: this JobSet exists and has not finished. Wait for it, cancel it, or choose "
            "another --name"
        )
    kubectl.run(record, "delete", "jobset", record["name"], "--cascade=foreground")


def _manifest(submission: Submission) -> dict[str, Any]:
    """The manifest that the flags mean.  ConfigError for what Kubernetes would refuse."""
    if not _IMAGE.value:
        raise ConfigError("--image must be given: the name of a container image with pgdist in it")
    for flag, value in (("namespace", _NAMESPACE.value), ("queue", _QUEUE.value)):
        if value:
            check_label(flag, value)
    pods = _pods()
    if submission.workdir:
        _check_workdir(submission.workdir, [mount["mountPath"] for mount in pods.mounts])
    check_job_name(submission.name, longest_suffix=pods.longest_suffix)
    return jobset(submission, pods, namespace=_NAMESPACE.value, queue=_QUEUE.value)


def _check_workdir(workdir: str, mounts: list[str]) -> None:
    """Raises ConfigError unless all hosts see it and it outlives the pods: in a bucket, or on a volume."""
    if workdir.startswith("gs://"):
        return
    path = posixpath.normpath(workdir)
    if not any(path == mount or path.startswith(mount.rstrip("/") + "/") for mount in mounts):
        raise ConfigError(
            f"--workdir={workdir}: expected a bucket, gs://BUCKET/RUN, or a path on a volume that all pods share, as "
            f"in --volume=CLAIM:/work and --workdir=/work/run; mounted are: {', '.join(mounts) or 'none'}"
        )


def _pods() -> Pods:
    volumes, mounts = read_volumes(_VOLUME.value)
    shape = _tpu_pods() if _TPU.value else _gpu_pods() if _GPU.value else _cpu_pods()
    requests = {"cpu": _CPU.value, "memory": _MEMORY.value}
    selector = shape.pop("node_selector") | (_SPOT_LABEL if _SPOT.value else {})
    tolerations = shape.pop("tolerations") + ([_SPOT_TOLERATION] if _SPOT.value else [])
    return Pods(
        image=check_image(_IMAGE.value),
        node_selector=selector | read_node_selector(_NODE_SELECTOR.value),
        tolerations=tolerations + read_tolerations(_TOLERATION.value),
        variables=read_variables(_ENV.value, _SECRET_ENV.value),
        volumes=volumes,
        mounts=mounts,
        shared_memory=check_quantity("shm", _SHM.value) if _SHM.value else "",
        service_account=_SERVICE_ACCOUNT.value and check_subdomain("service_account", _SERVICE_ACCOUNT.value),
        requests={name: check_quantity(name, value) for name, value in requests.items() if value},
        **shape,
    )


def _tpu_pods() -> dict[str, Any]:
    _refuse("with --tpu", "gpu", "gpus_per_node", "nodes", "processes_per_node", "devices_per_process")
    tpu = read_slice(_TPU.value, chips_per_host=_CHIPS_PER_HOST.value)
    if _SLICES.value > 1 and tpu.hosts == 1:
        raise ConfigError(
            f"--slices={_SLICES.value}: slices train together only where each has several hosts, and a "
            f"{_TPU.value} has one; take a larger topology"
        )
    return {
        "slices": _SLICES.value,
        "hosts": tpu.hosts,
        "agent_flags": (),
        "limits": {"google.com/tpu": tpu.chips_per_host},
        "node_selector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "tolerations": [],  # GKE adds the one for TPUs
        "is_exclusive": True,
    }


def _gpu_pods() -> dict[str, Any]:
    _refuse("with --gpu", "slices", "chips_per_host", "devices_per_process")
    if _GPUS_PER_NODE.value % _PROCESSES.value:
        raise ConfigError(
            f"--processes_per_node={_PROCESSES.value}: --gpus_per_node={_GPUS_PER_NODE.value} cannot be shared evenly"
        )
    name = check_label_value("gpu", _GPU.value)
    # One process sees all GPUs of its container anyway.
    sharing = (f"--processes={_PROCESSES.value}", "--gpus=all") if _PROCESSES.value > 1 else ()
    return {
        "slices": 1,
        "hosts": _NODES.value,
        "agent_flags": sharing,
        "limits": {"nvidia.com/gpu": _GPUS_PER_NODE.value},
        "node_selector": {} if name == "any" else {"cloud.google.com/gke-accelerator": name},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }


def _cpu_pods() -> dict[str, Any]:
    _refuse("without --tpu or --gpu", "slices", "chips_per_host", "gpus_per_node")
    processes = (f"--processes={_PROCESSES.value}",) if _PROCESSES.value > 1 else ()
    devices = (f"--devices_per_process={_DEVICES.value}",) if _DEVICES.value else ()
    return {
        "slices": 1,
        "hosts": _NODES.value,
        "agent_flags": processes + devices,
        "limits": {},
        "node_selector": {},
        "tolerations": [],
    }


def _refuse(where: str, *names: str) -> None:
    """Raises ConfigError where a flag is given that says nothing about this kind of pods."""
    given = [name for name in names if not flags.FLAGS[name].using_default_value]
    if given:
        raise ConfigError(f"--{given[0]} means nothing {where}")
