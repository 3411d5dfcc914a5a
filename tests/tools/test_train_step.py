"""The table of tools/bench/train_step.py: its cases are configs that can be run, its comparisons what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from launch.command_line import load_config
from pgdist.config import check_values
from tools.bench import train_step


@pytest.mark.parametrize("name", train_step.CASES)
def test_a_case_is_a_config_that_fills_its_topology(name, tmp_path):
    case = train_step.CASES[name]
    (tmp_path / "config.py").write_text(case.config_file())
    config = load_config(str(tmp_path / "config.py"))
    check_values(config)
    chips = math.prod(map(int, case.topology.partition(":")[2].split("x")))
    assert config.mesh.data * config.mesh.fsdp == chips
    assert config.batch_size == chips * case.rows


@pytest.mark.slow
def test_two_settings_are_measured_side_by_side(tmp_path):
    command = [
        sys.executable,
        train_step.__file__,
        "--config=configs/demo.py",
        "--measure",
        "--fake_devices=2",
    ]
    more = ["--with=--config.batch_size=8", f"--json={tmp_path / 'rows.json'}"]
    done = subprocess.run(
        [*command, *more], cwd=train_step.ROOT, capture_output=True, text=True, timeout=250, check=True
    )
    assert "  beside --config.batch_size=8" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"] for row in rows] == ["", "--config.batch_size=8"]
    for row, batch_size in zip(rows, (64, 8), strict=True):
        assert row["devices"] == "2 x cpu"
        assert row["examples_per_second"] == pytest.approx(batch_size / row["seconds"])
