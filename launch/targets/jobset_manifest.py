"""A job as a Kubernetes JobSet: one Job a slice (or one for all nodes), one pod a host, one agent a pod.

Pods never restart by themselves (`backoffLimit: 0`): the agents end together with the job's verdict as their
exit code, the first pod that ends so fails its Job, and the JobSet restarts as a whole, or not:

    exit code                            the Job fails with                       the JobSet
    1, 2, 3, 4 (126, 127: no command)    PodFailurePolicy, "exit code 2"          fails
    42, or the pod was disrupted         PodFailurePolicy, "exit code 42"         restarts, not counted
    43, 128 and more                     BackoffLimitExceeded                     restarts, at most maxRestarts times

The reason alone cannot tell the first two rows apart: the rules read the message, which JobSet can since 0.10.1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.submission import Submission
from launch.targets.kubernetes_values import Manifest, escape
from launch.verdict import PERMANENT, PREEMPTED

HOSTS = "hosts"  # the replicated job
LABEL = "app.kubernetes.io/instance"  # its value on the JobSet and on all its pods is the job's name

# Not TPU runtime's 8471, MEGASCALE's 8080, JAX's 8476 or the metrics' 8431.
_PORT = 8490
_MEGASCALE_PORT = 8080

# How long the agents wait for one another: nodes may have to be made first, and images pulled.
_JOIN_SECONDS = 1800

# Between the agent's SIGKILL to its processes and the kubelet's to the agent: time to write the verdict.
_GRACE_MARGIN = 30

_NO_COMMAND = (126, 127)  # what a shell says when the image has no Python

_GROUP = 1000  # the one that the Dockerfile's user belongs to

_JOB_INDEX = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
_JOBSET_UID = "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods:
    """What the pods are, one a host, as the flags said; the parts in the API's own form.

    slices: Jobs of `hosts` pods each.  agent_flags: about the devices of one host.  limits, requests: the
    resources of its container.  shared_memory: the size of /dev/shm, "" for no limit but the node's.
    is_exclusive: whether a node pool is for one Job, and a Job for one node pool.
    """

    image: str
    slices: int
    hosts: int
    agent_flags: tuple[str, ...]
    limits: dict[str, Any]
    requests: dict[str, str]
    node_selector: dict[str, str]
    tolerations: Sequence[Manifest]
    variables: Sequence[Manifest]
    volumes: Sequence[Manifest]
    mounts: Sequence[Manifest]
    shared_memory: str
    service_account: str = ""
    is_exclusive: bool = False

    @property
    def all_hosts(self) -> int:
        """Pods in the JobSet."""
        return self.slices * self.hosts

    @property
    def longest_suffix(self) -> str:
        """What the longest name of a pod has after the JobSet's: the indices, and five random characters."""
        return f"-{HOSTS}-{self.slices - 1}-{self.hosts - 1}-abcde"


def jobset(submission: Submission, pods: Pods, *, namespace: str, queue: str) -> Manifest:
    """The manifest, as an object.  namespace, queue: "" for none."""
    labels = {"app.kubernetes.io/name": "pgdist", LABEL: submission.name}
    metadata: Manifest = {"name": submission.name}
    metadata |= {"namespace": namespace} if namespace else {}
    metadata["labels"] = labels | ({"kueue.x-k8s.io/queue-name": queue} if queue else {})
    if pods.is_exclusive:  # a node pool is a slice: two Jobs must not share one, or one be spread over two
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    job = {
        "parallelism": pods.hosts,
        "completions": pods.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_failure_rules()},
        "template": {
            "metadata": {"labels": labels} | _fuse_annotations(pods.volumes),
            "spec": _pod(submission, pods),
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": submission.max_restarts,
                # All pods of an attempt are gone before the next one begins: they share a workdir.
                "restartStrategy": "BlockingRecreate",
                "rules": _failure_rules(),
            },
            "replicatedJobs": [{"name": HOSTS, "replicas": pods.slices, "template": {"spec": job}}],
        },
    }


def render(manifest: Manifest) -> str:
    """The manifest as YAML."""
    return yaml.dump(
        manifest, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=1000, allow_unicode=False
    )


def _pod_failure_rules() -> list[Manifest]:
    """In this order: a mistake stays one even on a node that is being taken away."""
    return [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": "agent",
                "operator": "In",
                "values": sorted((*PERMANENT, *_NO_COMMAND)),
            },
        },
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "agent", "operator": "In", "values": [PREEMPTED]},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _failure_rules() -> list[Manifest]:
    """What the messages of the Job controller about `_pod_failure_rules` mean; the first that matches counts."""
    codes = "|".join(map(str, sorted((*PERMANENT, *_NO_COMMAND))))
    return [
        {
            "name": "mistake",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [rf"failed with exit code ({codes})\b"],
        },
        {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [
                rf"failed with exit code {PREEMPTED}\b",
                r"has condition DisruptionTarget\b",
            ],
        },
        {
            "name": "lost",
            "action": "RestartJobSet",
            "onJobFailureReasons": ["BackoffLimitExceeded"],
        },
    ]


def _pod(submission: Submission, pods: Pods) -> Manifest:
    shared_memory = {"medium": "Memory"} | ({"sizeLimit": pods.shared_memory} if pods.shared_memory else {})
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(submission.grace) + _GRACE_MARGIN,
    }
    spec |= {"serviceAccountName": pods.service_account} if pods.service_account else {}
    spec |= {"nodeSelector": pods.node_selector} if pods.node_selector else {}
    spec |= {"tolerations": list(pods.tolerations)} if pods.tolerations else {}
    if pods.volumes:  # so that the image's user may write on them
        spec["securityContext"] = {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    spec["containers"] = [_container(submission, pods)]
    spec["volumes"] = [{"name": "shared-memory", "emptyDir": shared_memory}, *pods.volumes]
    return spec


def _container(submission: Submission, pods: Pods) -> Manifest:
    command, script = _command(submission, pods)
    resources = {"limits": pods.limits} if pods.limits else {}
    resources |= {"requests": pods.requests} if pods.requests else {}
    container: Manifest = {"name": "agent", "image": pods.image}
    container["command"] = ["/bin/sh", "-c", escape(script)]
    container["args"] = [escape(argument) for argument in command]
    container["env"] = [*_own_variables(submission, pods), *pods.variables]
    if pods.all_hosts > 1:
        container["ports"] = [{"name": "rendezvous", "containerPort": _PORT}]
    if "google.com/tpu" in pods.limits and pods.slices > 1:
        container["ports"].append({"name": "megascale", "containerPort": _MEGASCALE_PORT})
    container |= {"resources": resources} if resources else {}
    container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}, *pods.mounts]
    return container


def _command(submission: Submission, pods: Pods) -> tuple[list[str], str]:
    """The agent's command line and the script that runs it, which adds what only the pod knows.

    The script passes the words on untouched, and becomes the agent: signals reach it.
    """
    flags = list(pods.agent_flags)
    known_in_pod = ['--job_id="$PGDIST_JOBSET_UID"']
    if pods.all_hosts > 1:
        flags += [f"--hosts={pods.all_hosts}", f"--rendezvous={_first_host(submission)}:{_PORT}"]
        flags += [f"--join_timeout={_JOIN_SECONDS}"]
        index = "$JOB_COMPLETION_INDEX"
        if pods.slices > 1:
            index = f"$((PGDIST_SLICE * {pods.hosts} + JOB_COMPLETION_INDEX))"
        known_in_pod.append(f"--host={index}")
    python, *options = submission.agent_command(*flags)
    module, agent_arguments = options[:2], options[2:]
    script = f'exec {python} {" ".join(module)} {" ".join(known_in_pod)} "$@"'
    return ["agent", *agent_arguments], script


def _own_variables(submission: Submission, pods: Pods) -> list[Manifest]:
    """What the cluster knows; JOB_COMPLETION_INDEX it sets by itself, GKE also TPU_WORKER_ID and _HOSTNAMES."""
    variables = [_from_field("PGDIST_JOBSET_UID", _JOBSET_UID)]
    if pods.slices == 1:
        return variables
    variables.append(_from_field("PGDIST_SLICE", _JOB_INDEX))
    if "google.com/tpu" in pods.limits:
        variables += [
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": _first_host(submission)},
            {"name": "MEGASCALE_PORT", "value": str(_MEGASCALE_PORT)},
            {"name": "MEGASCALE_NUM_SLICES", "value": str(pods.slices)},
            _from_field("MEGASCALE_SLICE_ID", _JOB_INDEX),
        ]
    return variables


def _from_field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _first_host(submission: Submission) -> str:
    """The name of the first pod in the cluster; the JobSet's headless service has the JobSet's name."""
    return f"{submission.name}-{HOSTS}-0-0.{submission.name}"


def _fuse_annotations(volumes: Sequence[Manifest]) -> Manifest:
    """GKE adds the container that mounts buckets to pods that say so."""
    return {"annotations": {"gke-gcsfuse/volumes": "true"}} if any("csi" in v for v in volumes) else {}


# Texts that every reader of YAML takes for a text, bar the words for true, false and null, which PyYAML quotes.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")


class _Dumper(yaml.SafeDumper):
    """Quotes whatever some reader might take for something else: 1e3 is a text to PyYAML, a number to Go."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # what stands in two places is written in both


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if _PLAIN.fullmatch(text) else '"' if "'" in text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
