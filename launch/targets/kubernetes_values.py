"""Flag values that become parts of a Kubernetes manifest, checked before anything is applied.

The API server refuses most of these too, but later, one by one and in the terms of the manifest; here the
message names the flag. The rules are those of the Kubernetes API: names as in RFC 1035 and RFC 1123, labels,
quantities, image references.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pgdist.errors import ConfigError

_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_SECRET_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")
_BUCKET = re.compile(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]")
# [registry[:port]/]path[:tag][@digest], the grammar of the distribution project
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9.-]+(?::\d+)?/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")

# Set for every process by the manifest, the agent, or the cluster.
_OURS = re.compile(r"PGDIST_\w+|MEGASCALE_\w+|TPU_WORKER_\w+|JOB_COMPLETION_INDEX")

Manifest = dict[str, Any]


def check_job_name(name: str, *, longest_suffix: str) -> str:
    """A JobSet's name: pods are called `name` and a suffix, and all of it is one label of a host name."""
    room = 63 - len(longest_suffix)
    if not _LABEL_1035.fullmatch(name) or len(name) > room:
        raise ConfigError(
            f"--name={name}: expected at most {room} lower-case letters, digits and dashes that begin with a letter "
            "and do not end with a dash"
        )
    return name


def check_image(image: str) -> str:
    """A container image as registries name them."""
    if not _IMAGE.fullmatch(image):
        raise ConfigError(
            f"--image={image!r}: expected the name of a container image, such as "
            "us-docker.pkg.dev/project/images/pgdist:v1"
        )
    return image


def check_label(flag: str, value: str) -> str:
    """The name of a namespace or of a queue."""
    if not _LABEL_1123.fullmatch(value):
        raise ConfigError(f"--{flag}={value!r}: expected at most 63 lower-case letters, digits and dashes")
    return value


def check_subdomain(flag: str, value: str) -> str:
    """The name of most other things."""
    if not _SUBDOMAIN.fullmatch(value):
        raise ConfigError(f"--{flag}={value!r}: expected lower-case letters, digits, dashes and dots")
    return value


def check_label_value(flag: str, value: str) -> str:
    """The value of a node label."""
    if value and not _LABEL_NAME.fullmatch(value):
        raise ConfigError(
            f"--{flag}={value!r}: expected at most 63 letters, digits, dashes, underscores and dots"
        )
    return value


def check_quantity(flag: str, value: str) -> str:
    """An amount of memory or of CPUs."""
    if not _QUANTITY.fullmatch(value):
        raise ConfigError(f"--{flag}={value!r}: expected an amount such as 16Gi, 500m or 8")
    return value


def escape(text: str) -> str:
    """`text` as the kubelet reads it back: it replaces $(NAME) in arguments and values, and $$ by $."""
    return text.replace("$", "$$")


def read_variables(variables: Sequence[str], secrets: Sequence[str]) -> list[Manifest]:
    """What --env=NAME=VALUE and --secret_env=NAME=SECRET:KEY give a container."""
    entries = []
    for text in variables:
        name, value = _split_variable("env", text, "NAME=VALUE")
        entries.append({"name": name, "value": escape(value)})
    for text in secrets:
        name, value = _split_variable("secret_env", text, "NAME=SECRET:KEY")
        secret, _, key = value.partition(":")
        if not _SUBDOMAIN.fullmatch(secret) or not _SECRET_KEY.fullmatch(key):
            raise ConfigError(f"--secret_env={text!r}: expected NAME=SECRET:KEY, such as HF_TOKEN=hub:token")
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    names = [entry["name"] for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--env: {twice[0]} is given twice")
    return entries


def _split_variable(flag: str, text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _VARIABLE.fullmatch(name):
        raise ConfigError(f"--{flag}={text!r}: expected {form}, a name of letters, digits and underscores")
    if _OURS.fullmatch(name):
        raise ConfigError(f"--{flag}={text!r}: the launcher sets {name} itself; it would not reach the job")
    if "\0" in value:
        raise ConfigError(f"--{flag}: the value of {name} has a zero byte in it")
    return name, value


def read_node_selector(pairs: Sequence[str]) -> dict[str, str]:
    """What --node_selector=LABEL=VALUE means."""
    selector = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        _check_label_key("node_selector", text, key)
        if not equals:
            raise ConfigError(f"--node_selector={text!r}: expected LABEL=VALUE")
        selector[key] = check_label_value(f"node_selector={key}", value)
    return selector


def read_tolerations(texts: Sequence[str]) -> list[Manifest]:
    """What --toleration=KEY[=VALUE][:EFFECT] means, as kubectl taint writes taints."""
    tolerations = []
    for text in texts:
        taint, colon, effect = text.partition(":")
        key, equals, value = taint.partition("=")
        _check_label_key("toleration", text, key)
        if colon and effect not in _EFFECTS:
            raise ConfigError(f"--toleration={text!r}: the effect is one of {', '.join(_EFFECTS)}")
        toleration = {"key": key, "operator": "Equal" if equals else "Exists"}
        toleration |= {"value": check_label_value("toleration", value)} if equals else {}
        tolerations.append(toleration | ({"effect": effect} if colon else {}))
    return tolerations


def _check_label_key(flag: str, text: str, key: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if not _LABEL_NAME.fullmatch(name) or (slash and not _SUBDOMAIN.fullmatch(prefix)):
        raise ConfigError(
            f"--{flag}={text!r}: {key!r} is no name of a label or taint; they are like cloud.google.com/gke-nodepool"
        )


def read_volumes(texts: Sequence[str]) -> tuple[list[Manifest], list[Manifest]]:
    """The volumes of a pod and where its container mounts them.

    What --volume=CLAIM:/PATH (a PersistentVolumeClaim) and --volume=gs://BUCKET:/PATH (Cloud Storage FUSE) mean.
    """
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    for number, text in enumerate(texts):
        source, colon, path = text.rpartition(":")
        if not colon or not path.startswith("/") or path in ("/", "/dev/shm") or not path.isprintable():
            raise ConfigError(
                f"--volume={text!r}: expected CLAIM:/PATH or gs://BUCKET:/PATH, with an absolute path of its own"
            )
        if path in [mount["mountPath"] for mount in mounts]:
            raise ConfigError(f"--volume={text!r}: {path} is mounted twice")
        name = f"volume-{number}"
        volumes.append({"name": name} | _volume_source(text, source))
        mounts.append({"name": name, "mountPath": path})
    return volumes, mounts


def _volume_source(text: str, source: str) -> Manifest:
    bucket = source.removeprefix("gs://")
    if bucket != source:
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"--volume={text!r}: {bucket!r} is no name of a bucket")
        attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    if not _SUBDOMAIN.fullmatch(source):
        raise ConfigError(f"--volume={text!r}: {source!r} is no name of a PersistentVolumeClaim")
    return {"persistentVolumeClaim": {"claimName": source}}
