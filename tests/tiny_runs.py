"""Whole runs in small, for tests: drawn scenes, the `tiny` preset with random weights, and what a run leaves.

Everything trains, by SGD in float32, unless a test says otherwise: then losses and parameters can be compared
between meshes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from launch.command_line import flatten as flatten_config
from pgdist import weights
from pgdist.config import default_config
from pgdist.models.presets import PRESETS
from pgdist.parameters import flatten
from tests.models.small import random_parameters
from tools import make_demo_data

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "assets" / "tiny_tokenizer.model"
TEXT_LENGTH = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files that runs start from."""

    train: Path
    validation: Path
    weights: Path


def write_inputs(folder: Path, *, seed: int = 0) -> Inputs:
    """Draws 24 training examples and 4 of validation, and random weights in the published layout."""
    size = PRESETS["tiny"].image.image_size
    settings = make_demo_data.Settings(task="pretrain", seed=seed, size=size, max_objects=2)
    make_demo_data.write_split(folder, settings, split="train", scenes=6)
    make_demo_data.write_split(folder, settings, split="validation", scenes=1)
    return Inputs(
        train=folder / "train.jsonl",
        validation=folder / "validation.jsonl",
        weights=write_weights(folder / "random.npz", seed=seed),
    )


def write_weights(path: Path, *, seed: int) -> Path:
    """Weights of the `tiny` preset, every one of them random."""
    weights.save(path, flatten(random_parameters(PRESETS["tiny"], seed=seed)))
    return path


def tiny_config(inputs: Inputs, **fields: Any) -> ConfigDict:
    """20 steps of 8 examples on the inputs, without evaluation.  fields: by dotted name, {"mesh.data": 2}."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "model.preset": "tiny",
            "model.image_dtype": "float32",
            "model.text_dtype": "float32",
            "init": str(inputs.weights),
            "tokenizer": str(TOKENIZER),
            "data.train": str(inputs.train),
            "data.text_length": TEXT_LENGTH,
            "trainable": ((".*", 1.0),),
            "optimizer.learning_rate": 0.02,
            "steps": 20,
            "batch_size": 8,
            "checkpoint.every": 100,
            "export": False,
            "eval.max_new_tokens": 4,
            **fields,
        }
    )
    return config


def write_config(path: Path, config: ConfigDict) -> Path:
    """A config file that gives the config, for runs in other processes."""
    fields = {name: value for name, value in flatten_config(config).items() if value is not None}
    lines = [
        "from pgdist.config import default_config\n\n\ndef get_config():\n    config = default_config()",
        f"    config.update_from_flattened_dict({fields!r})",
        "    return config\n",
    ]
    path.write_text("\n".join(lines))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    """{step: training loss}; a step that was written twice is an error."""
    found: dict[int, float] = {}
    for row in read_jsonl(workdir / "metrics.jsonl"):
        if "train/loss" in row:
            assert row["step"] not in found, f"step {row['step']} stands twice in metrics.jsonl"
            found[row["step"]] = row["train/loss"]
    return found


def host(tree: Any) -> dict[str, np.ndarray]:
    """{name: array} of a nested tree of parameters, on the host."""
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def assert_same_bits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    assert not different


def largest_difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.max(np.abs(one[name] - other[name]), initial=0.0)) for name in one)
