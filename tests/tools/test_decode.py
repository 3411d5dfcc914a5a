"""The tables of tools/bench/decode.py and transformers_decode.py: their figures are of what was asked for."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from pgdist.mesh import make_mesh
from pgdist.models.presets import PRESETS
from tools.bench import decode

SMALL_TASK = ("--batch_sizes=2", "--prompt_tokens=4", "--new_tokens=3", "--rounds=1")
TASK = decode.Task(batch_size=8, prompt_tokens=4, new_tokens=3)


def run(script: str, *flags: str) -> list[str]:
    command = [sys.executable, script, *SMALL_TASK, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_calls_answer_every_prompt_with_as_many_tokens_as_asked_for():
    config, mesh = PRESETS["tiny"], make_mesh(devices=jax.devices()[:1])
    calls = TASK.calls(config, decode.random_params(decode.describe_params(config, mesh)), mesh)
    assert {name: np.shape(call()) for name, call in calls.items()} == {"first": (8, 1), "all": (8, 3)}


def test_a_step_reads_a_device_s_part_of_the_decoder_and_the_cache_of_its_rows():
    config = PRESETS["tiny"]
    text = config.text

    def read(**axes: int) -> float:
        params = decode.describe_params(config, make_mesh(**axes))
        return decode.step_bytes(config, params, TASK, devices=8)

    attention = text.depth * 2 * text.width * (text.num_heads + 1) * text.head_dim
    mlp = text.depth * 3 * text.width * text.mlp_dim
    table = text.vocab_size * text.width
    norms = (2 * text.depth + 1) * text.width
    cache = 2 * text.depth * text.head_dim * (49 + 4 + 1.5)
    assert read(data=8, fsdp=1) == 4 * (attention + mlp + table + norms + cache)
    assert read(data=1, fsdp=8) == 4 * (attention + (mlp + table) / 8 + norms + cache)


@pytest.mark.slow
def test_the_devices_here_are_measured_and_told_in_json(tmp_path):
    path = tmp_path / "rows.json"
    first, heading, line = run(decode.__file__, "--fake_devices=2", f"--json={path}")
    assert first == "2 x cpu, mesh {'data': 1, 'fsdp': 2}, float32"
    assert "tokens/s" in heading and line.startswith("tiny, batch 2")
    (row,) = json.loads(path.read_text())
    seconds = row["first_token_seconds"] + (row["new_tokens"] - 1) * row["token_seconds"]
    assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * row["new_tokens"] / seconds)
    assert row["bandwidth_share"] == pytest.approx(row["bytes_per_second"] / row["memory_bandwidth"])


@pytest.mark.parity
def test_transformers_gives_the_same_tokens_beside(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "rows.json"
    script = decode.__file__.replace("decode.py", "transformers_decode.py")
    run(script, "--sizes", "tiny", "--device=cpu", f"--json={path}")
    (row,) = json.loads(path.read_text())
    assert row["agreement"] == 1.0
    for name in ("first_token_seconds", "token_seconds"):
        assert math.isclose(row[f"{name}_ratio"], row[f"theirs_{name}"] / row[name])
