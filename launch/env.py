"""Print what a bug report needs: versions, devices, machine, and the settings that matter; no secrets.

    python -m launch.env
    python -m launch.env --check     in every process of a job: join it, and check that it is healthy

--check prints one line a fact in process 0. Exit codes: 0 healthy, 2 the processes do not run the same thing, 43
one did not come, or devices do not work together.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import entry, membership
from pgdist import heartbeat
from pgdist.environment import describe_environment
from pgdist.errors import ConfigError

_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_CHECK = flags.DEFINE_bool("check", False, "Join the job and check that it is healthy, nothing else.")


def main() -> None:
    """Prints the environment on standard output, or checks the job."""
    if _CHECK.value:
        _check()
        return
    environment = {"job": _describe_job(), **describe_environment()}
    print(json.dumps(environment, indent=2) if _JSON.value else render(environment))


def render(environment: dict[str, Any]) -> str:
    """The environment as text for people: one line a fact, those that belong together under a title."""
    lines = []
    for name, value in environment.items():
        if isinstance(value, dict):
            facts = {key: fact for key, fact in value.items() if fact is not None}
            lines += [f"{name}:"] if facts else []
            lines += [f"  {key:<24} {_readable(key, fact)}" for key, fact in facts.items()]
        elif value is not None:
            lines.append(f"{name + ':':<26} {value}")
    return "\n".join(lines)


def _check() -> None:
    heartbeat.beat("starting")
    stdout = membership.join_job()
    from pgdist import cluster, health

    heartbeat.beat("loading")
    facts = health.check()
    heartbeat.beat("finishing")
    if cluster.is_primary():
        print(*facts, "The job is healthy.", sep="\n", file=stdout, flush=True)
    cluster.leave()


def _describe_job() -> dict[str, Any]:
    """The job that a command started here would join, and why; nothing is joined."""
    try:
        place = membership.describe_job()
    except ConfigError as error:
        return {"error": str(error)}
    return {
        "would_join_as": f"process {place.process_id} of {place.num_processes}",
        "because_of": place.why,
        "coordinator": place.coordinator or None,
        "local_device_ids": place.local_device_ids and list(place.local_device_ids),
    }


def _readable(name: str, value: Any) -> str:
    if name.endswith(("_bytes", "_bytes_each")):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, dict):  # a setting of the backend
        return f"{value['value']}, set by {value['set_by']}: {value['reason']}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    entry.run(main, name="env", usage=__doc__)
