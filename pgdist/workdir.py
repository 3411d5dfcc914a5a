"""The folder of a run: where each file lies, and whether a config may go on in it.

    config.json data.json env.json parameters.json     what ran, on what
    metrics.jsonl tb/ examples.jsonl predictions/ report.html     what to look at
    checkpoints/ model.npz bad_records.jsonl profile/

Process 0 writes what a job has only one of. In a bucket (gs://...) checkpoints are written there; the rest is
written to a local folder, from which each process copies what it has written (`pgdist.files`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from pgdist import cluster, files
from pgdist.config import default_config
from pgdist.errors import ConfigError

# Fields that change where and how fast a run goes, not what it computes: a run may go on with others.
_FREE_FIELDS = (
    "mesh.",
    "checkpoint.",
    "data.workers",
    "data.max_bad_share",
    "model.attention",
    "model.remat",
    "gradient_accumulation_steps",
    "export",
)

# Fields that decide which arrays a checkpoint holds, and so whether a run can go on from it at all.
_CHECKPOINT_FIELDS = ("init", "model.preset", "optimizer.name", "trainable")

# In a bucket these are not copied here when a run goes on: they are large, or others' affair.
_NOT_FETCHED = (
    "checkpoints",
    "checkpoints_damaged",
    "model.npz",
    "profile",
    "logs",
    "attempts",
    "compilation_cache",
)


class Workdir:
    """The paths of one run's files; process 0 alone writes what the job has one of.

    A context manager, for whoever writes: at its end all is where `path` says, or the error says what is not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """path: a local folder, in which `~` is the home folder, or gs://BUCKET/FOLDER; ConfigError for others."""
        self.name = os.fspath(path)  # as its user calls it
        self._files = files.open_folder(path)
        self.path = self._files.local
        self.config = self.path / "config.json"
        self.environment = self.path / "env.json"
        self.parameters = self.path / "parameters.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.examples = self.path / "examples.jsonl"
        self.checkpoints = (files.folder(path) if files.is_url(path) else self.path) / "checkpoints"
        self.model = self.path / "model.npz"
        self.data = self.path / "data.json"
        self.profile = self.path / "profile"

    def __enter__(self) -> Workdir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # All wait: who left first would be waiting in JAX's shutdown, which gives up after minutes.
            cluster.together(self._files.close)
            return
        try:
            self._files.close()
        except ConfigError as unfinished:
            logging.error("%s", unfinished)  # what ends the run is more important

    def sync(self) -> None:
        """Returns when all that is written by now is where `path` says; complains where that fails."""
        try:
            self._files.flush()
        except ConfigError as error:
            logging.warning("%s It is tried again.", error)

    def fetch_model(self) -> Path:
        """A local path of the trained model; nothing is there where the run has none yet."""
        self._files.fetch_file(self.model.name)
        return self.model

    def predictions(self, step: int) -> Path:
        """What the evaluation after `step` updates decoded."""
        return self.path / "predictions" / f"step_{step:06d}.jsonl"

    def bad_records(self, process_index: int) -> Path:
        """The bad records that a process met; process 0's has the plain name."""
        return self.path / (
            "bad_records.jsonl" if process_index == 0 else f"bad_records_{process_index:03d}.jsonl"
        )

    def read_config(self) -> dict[str, Any] | None:
        """The config that a run recorded here, nested; None without one. ConfigError where it is damaged."""
        self._files.fetch_file(self.config.name)
        try:
            config = json.loads(self.config.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        if not isinstance(config, dict):
            raise self._damaged(f"it holds a {type(config).__name__}")
        return config

    def check(self, config: ConfigDict, *, fork: bool, data: str = "") -> None:
        """Raises ConfigError where the folder cannot be written, or belongs to another run unless `fork`.

        data: what the training data is, as `pgdist.data.jsonl.fingerprint` tells it; "" is not compared.
        Changes nothing, so that what goes wrong before the run has begun leaves no run of its config behind.
        """
        cluster.together(self._fetch)
        cluster.on_primary(lambda: self._check(config, fork=fork, data=data))

    def make(self) -> None:
        """Makes the folder; ConfigError where that fails although `check` saw no reason."""
        cluster.on_primary(self._make)
        self._files.start()

    def record(self, config: ConfigDict, *, data: str = "") -> None:
        """Writes config and data into the folder; a different config stays as config_before_fork_N.json."""
        cluster.on_primary(lambda: self._record(config, data=data))

    def _fetch(self) -> None:
        if cluster.is_primary():
            self._files.fetch(skip=_NOT_FETCHED)
        else:
            self._files.fetch_file(self.bad_records(jax.process_index()).name)

    def _check(self, config: ConfigDict, *, fork: bool, data: str) -> None:
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            found = "cannot be written" if there.is_dir() else "is a file"
            raise self._unwritable(f"{there} {found}")
        different = self._differences(config)
        lines = [f"  config.{field}: {old!r} -> {new!r}" for field, (old, new) in different.items()]
        if (known := self._read_data()) and data and known != data:
            lines.append(f"  content of config.data.train: {known} -> {data}")
        if lines and not fork:
            advice = "Use a new --workdir, or --fork to go on in this one with what is new."
            if lasting := ", ".join(field for field in different if field in _CHECKPOINT_FIELDS):
                advice = f"Use a new --workdir: checkpoints of other arrays are in this one ({lasting})."
            raise ConfigError(
                f"--workdir={self.name} holds another run (there -> here):\n" + "\n".join([*lines, advice])
            )

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error
        if files.is_url(remote := self.checkpoints.parent):
            with files.blaming(remote):
                probe = remote / ".writable"
                probe.write_text("")
                probe.unlink()

    def _record(self, config: ConfigDict, *, data: str) -> None:
        if self._differences(config):
            number = len(list(self.path.glob("config_before_fork_*.json"))) + 1
            shutil.copyfile(self.config, self.path / f"config_before_fork_{number}.json")
        write_json(self.config, json.loads(config.to_json()))
        write_json(self.data, {"train": data})

    def _read_data(self) -> str:
        """What the recorded run's training data is; "" where nobody knows."""
        try:
            return json.loads(self.data.read_text())["train"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _differences(self, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
        """{field: (recorded value, value here)} of the fields that differ."""
        recorded = self.read_config()
        if recorded is None:
            return {}
        # A field that is younger than the run had its default's effect.
        old = _flatten(json.loads(default_config().to_json())) | _flatten(recorded)
        new = _flatten(json.loads(config.to_json()))
        return {
            field: (old.get(field), new.get(field))
            for field in sorted(old.keys() | new.keys())
            if old.get(field) != new.get(field) and not field.startswith(_FREE_FIELDS)
        }

    def _unwritable(self, found: str) -> ConfigError:
        return ConfigError(
            f"--workdir={self.name}: expected a folder that can be made and written, found: {found}. "
            "Name another one."
        )

    def _damaged(self, found: str) -> ConfigError:
        return ConfigError(
            f"{self.name}/{self.config.name}: expected a run's config as JSON, found: {found}. Mend it, or use a new "
            "--workdir."
        )


def write_json(path: Path, value: Any) -> None:
    """Replaces the file as a whole."""
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(replacement, path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file as a whole, one line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(".tmp")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot, is written as JSON's own escape.
    replacement.write_text(lines, encoding="utf-8", errors="backslashreplace")
    os.replace(replacement, path)


def _flatten(tree: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{parent}{name}.") if isinstance(value, dict) else {f"{parent}{name}": value}
    return flat
