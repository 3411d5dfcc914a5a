"""The `pgdist` command finds the right module and passes everything on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import console


def _pgdist(*arguments, **options):
    command = [sys.executable, "-c", "from launch.console import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **options)


def test_a_command_runs_as_its_module_would_anywhere(tmp_path):
    done = _pgdist("env", "--json", "--fake_devices=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"]["count"] == 3


def test_a_command_shows_its_own_help():
    assert "(or: pgdist env [flags])\n" in _pgdist("env", "--help").stdout


def test_exit_codes_pass_through():
    done = _pgdist("env", "--jsno")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pgdist: error: unknown flag --jsno; did you mean --json?\n"


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "text"),
    [
        (["--help"], 0, "stdout", "train"),
        (["--version"], 0, "stdout", "pgdist 0."),
        ([], 2, "stderr", "Commands:"),
        (
            ["trian"],
            2,
            "stderr",
            "pgdist: error: no command 'trian'; there are: train, submit, predict, convert, env",
        ),
    ],
)
def test_without_a_command_it_says_which_there_are(arguments, code, stream, text):
    done = _pgdist(*arguments)
    assert done.returncode == code
    assert text in getattr(done, stream)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", console.COMMANDS)
def test_every_command_exists_and_has_help(command):
    done = _pgdist(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"pgdist {command}" in done.stdout
