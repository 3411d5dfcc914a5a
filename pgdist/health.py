"""The health check of a job, before it trains: do its processes run the same thing, and do their devices add up?

Every process tells what it runs (code, config, libraries, Python), process 0 compares, and all of them end with
what differs and where. No part waits for ever: a process that does not come is named, and so is a network on which
devices cannot add up a number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import pgdist
from pgdist import cluster
from pgdist.config import fields_of
from pgdist.environment import package_versions
from pgdist.errors import ConfigError, PeerLostError
from pgdist.roll_call import name_processes

Result = TypeVar("Result")

SECONDS = 180.0  # for each part: loading plugins and connecting hundreds of devices takes a while

# Seconds between two clocks. Far more than the moments that processes leave a barrier apart (well under a second,
# also on a loaded machine); more would mix up the hosts' logs, file times and metrics, and at minutes clouds refuse
# credentials.
CLOCK_LIMIT = 10.0

_SHOWN = 12  # differences in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a process tells of itself.  time: its clock as it left the barrier.  facts: what must be the same."""

    host: str
    time: float
    facts: Mapping[str, str]


def check(config: ConfigDict | None = None, *, seconds: float = SECONDS) -> list[str]:
    """Checks that all processes run the same and that their devices work together; all must call this.

    config: the resolved config; None for a command without.  Returns the facts found, a line each, for people.
    Raises ConfigError in all processes where some differ, PeerLostError that names who does not come within
    `seconds`, and where the devices do not add up.
    """
    code, libraries = _code(), _libraries()
    compare({**code, **libraries, **_config_facts(config)}, name="health", seconds=seconds)
    devices = _within(seconds, jax.devices, doing="see each other's devices")
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    seen = {"number of devices seen": str(len(devices)), "kind of devices seen": kinds}
    compare(seen, name="devices", seconds=seconds)
    started = time.monotonic()
    total, expected = _within(seconds, _device_sum, doing="add up a number over all devices")
    if total != expected:
        raise PeerLostError(
            f"{len(devices)} devices added up to {total}, not {expected}: one of them is broken."
        )
    return [
        f"processes: {jax.process_count()} on {_hosts()}",
        f"code: {len(code)} files, libraries: {len(libraries)}, the same in all processes",
        f"Python: {platform.python_version()}",
        f"devices: {len(devices)} ({kinds}), seen by all processes; {jax.local_device_count()} of them here",
        f"sum over all devices: {total}, as expected, in {time.monotonic() - started:.1f} s",
    ]


def compare(facts: Mapping[str, str], *, name: str, seconds: float = SECONDS) -> None:
    """Raises ConfigError in all processes unless the facts are the same in all; all must call this.

    facts: {what it is, for people: its value}.  name: of this comparison, once in a job.
    """
    if not jax.distributed.is_initialized():
        return
    cluster.barrier(f"health check ({name})", seconds=seconds)
    own = Report(host=socket.gethostname(), time=time.time(), facts=dict(facts))
    texts = cluster.gather(f"health {name}", json.dumps(dataclasses.asdict(own)), seconds=seconds)
    found = "\n".join(differences([Report(**json.loads(text)) for text in texts])) if texts else ""
    if found := cluster.announce(f"health {name}", found, seconds=seconds):
        raise ConfigError(
            f"the processes of this job differ:\n{found}\nAll of them must run the same code with the same "
            "libraries, config and data, started by the same command."
        )


def differences(reports: Sequence[Report]) -> list[str]:
    """What differs from process 0, a line each; those with the same difference share one.

    reports: of all processes, in their order.
    """
    first = reports[0]
    told: dict[str, list[int]] = {}  # difference: the processes that have it
    for number, report in enumerate(reports[1:], start=1):
        found = []
        if abs(skew := report.time - first.time) > CLOCK_LIMIT:
            found.append(
                f"clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} process 0 (host {first.host}), "
                f"more than {CLOCK_LIMIT:.0f} s"
            )
        for name in sorted(first.facts.keys() | report.facts.keys()):
            here, there = report.facts.get(name, "absent"), first.facts.get(name, "absent")
            if here != there:
                found.append(f"{name} is {here}, but {there} in process 0 (host {first.host})")
        for difference in found:
            told.setdefault(difference, []).append(number)
    lines = []
    for difference, numbers in told.items():
        hosts = sorted({reports[number].host for number in numbers})
        shown = hosts if len(hosts) <= 4 else [*hosts[:3], "..."]
        noun = "host" if len(hosts) == 1 else "hosts"
        lines.append(f"  {name_processes(numbers)} ({noun} {', '.join(shown)}): {difference}")
    return (
        lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  and {len(lines) - _SHOWN} more differences"]
    )


def _code() -> dict[str, str]:
    """{file of pgdist or launch: the beginning of its SHA-256}: tells versions apart without git, too."""
    root = Path(pgdist.__file__).parents[1]
    files = [path for package in ("pgdist", "launch") for path in (root / package).rglob("*.py")]
    return {
        f"code {path.relative_to(root)}": hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in files
    }


def _libraries() -> dict[str, str]:
    versions = {f"library {name}": version for name, version in package_versions().items()}
    return versions | {"Python": platform.python_version()}


def _config_facts(config: ConfigDict | None) -> dict[str, str]:
    return (
        {} if config is None else {f"config.{name}": repr(value) for name, value in fields_of(config).items()}
    )


def _within(seconds: float, action: Callable[[], Result], *, doing: str) -> Result:
    """What `action` returns; PeerLostError where it takes longer, and in a job of several where it fails."""
    results: list[Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    # A collective that misses somebody never ends. Nobody can end this thread either, but the process can go.
    thread = threading.Thread(target=run, daemon=True, name="health-check")
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if errors and not jax.distributed.is_initialized():
        raise errors[0]
    why = str(errors[0]) if errors else f"nothing came of it within {seconds:g} s"
    raise PeerLostError(
        f"the processes of this job find each other but cannot {doing}: {why}. Look at firewalls (all ports between "
        "the hosts are needed), and for GPUs at NCCL_SOCKET_IFNAME, with NCCL_DEBUG=INFO."
    )


def _device_sum() -> tuple[int, int]:
    """(the sum of 1, 2, ... over all devices, computed by all of them together; what it must be)."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("all",))
    split, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("all"), PartitionSpec()))
    numbers = np.arange(1, len(devices) + 1, dtype=np.int32)
    array = jax.make_array_from_callback(numbers.shape, split, lambda index: numbers[index])
    return int(jax.jit(jnp.sum, out_shardings=everywhere)(array).addressable_data(0)), int(numbers.sum())


def _hosts() -> str:
    names = list(dict.fromkeys(cluster.hosts()))
    shown = names if len(names) <= 8 else [*names[:8], "..."]
    return f"{len(names)} host{'s' if len(names) > 1 else ''} ({', '.join(shown)})"
