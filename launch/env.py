"""Print what a bug report needs: versions, devices, machine, and the settings that matter; no secrets."""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import entry
from pgdist.environment import describe_environment

_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_FAKE_DEVICES = flags.DEFINE_integer("fake_devices", 0, "Simulate this many CPU devices.", lower_bound=0)


def main() -> None:
    """Prints the environment on standard output."""
    if _FAKE_DEVICES.value:
        entry.simulate_devices(_FAKE_DEVICES.value)
    environment = describe_environment()
    print(json.dumps(environment, indent=2) if _JSON.value else render(environment))


def render(environment: dict[str, Any]) -> str:
    """The environment as text for people: one line a fact, those that belong together under a title."""
    lines = []
    for name, value in environment.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            facts = {key: fact for key, fact in value.items() if fact is not None}
            lines += [f"  {key:<22} {_readable(key, fact)}" for key, fact in facts.items()]
        elif value is not None:
            lines.append(f"{name + ':':<24} {value}")
    return "\n".join(lines)


def _readable(name: str, value: Any) -> str:
    if name.endswith(("_bytes", "_bytes_each")):
        return f"{value / 2**30:.1f} GiB"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    entry.run(main, name="env", usage=__doc__)
