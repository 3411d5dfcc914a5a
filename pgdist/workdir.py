"""The folder of a run: where each file lies, and whether a config may go on in it.

config.json env.json parameters.json     what ran, on what
metrics.jsonl tb/ examples.jsonl predictions/ report.html     what to look at
checkpoints/ model.npz bad_records.jsonl
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgdist import cluster
from pgdist.errors import ConfigError

# Fields that change where and how fast a run goes, not what it computes: a run may go on with others.
_FREE_FIELDS = ("mesh.", "checkpoint.", "data.workers", "model.remat", "export")


class Workdir:
    """The paths of one run's files; process 0 alone writes what the job has one of."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "env.json"
        self.parameters = self.path / "parameters.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.examples = self.path / "examples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.npz"

    def predictions(self, step: int) -> Path:
        """What the evaluation after `step` updates decoded."""
        return self.path / "predictions" / f"step_{step:06d}.jsonl"

    def bad_records(self, process_index: int) -> Path:
        """The bad records that a process met; process 0's has the plain name."""
        return self.path / (
            "bad_records.jsonl" if process_index == 0 else f"bad_records_{process_index:03d}.jsonl"
        )

    def prepare(self, config: ConfigDict, *, fork: bool) -> None:
        """Makes the folder and records the config in it.

        Raises ConfigError where the folder cannot be written, or belongs to another config and `fork` is not
        set; with it the old config is kept as config_before_fork_N.json.
        """
        values = flatten_config(config)
        if cluster.is_primary():
            self._make()
            self._check_config(values, fork=fork)
            write_json(self.config, json.loads(config.to_json()))
        cluster.barrier("workdir prepared")

    def _make(self) -> None:
        try:
            (self.path / "predictions").mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"--workdir={self.path}: expected a folder that can be written, found: {error.strerror}."
            ) from error

    def _check_config(self, values: Mapping[str, Any], *, fork: bool) -> None:
        if not self.config.exists():
            return
        try:
            old_text = self.config.read_text()
            old = _flatten(json.loads(old_text))
        except ValueError as error:
            raise ConfigError(
                f"{self.config} is not valid JSON ({error}): mend it, or use a new --workdir."
            ) from error
        different = [
            f"  config.{field}: {old.get(field)!r} -> {values.get(field)!r}"
            for field in sorted(old.keys() | values.keys())
            if old.get(field) != values.get(field) and not field.startswith(_FREE_FIELDS)
        ]
        if not different:
            return
        if not fork:
            raise ConfigError(
                f"--workdir={self.path} holds a run of another config (there -> here):\n"
                + "\n".join(different)
                + "\nUse a new --workdir, or --fork to go on in this one with the new config."
            )
        number = len(list(self.path.glob("config_before_fork_*.json"))) + 1
        (self.path / f"config_before_fork_{number}.json").write_text(old_text)


def flatten_config(config: ConfigDict) -> dict[str, Any]:
    """{dotted field: value}, as JSON would give it back."""
    return _flatten(json.loads(config.to_json()))


def write_json(path: Path, value: Any) -> None:
    """Replaces the file as a whole."""
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(replacement, path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file as a whole, one line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(replacement, path)


def _flatten(tree: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{parent}{name}.") if isinstance(value, dict) else {f"{parent}{name}": value}
    return flat
