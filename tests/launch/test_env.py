"""What a bug report contains, and that it contains no secrets."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from launch import env
from pgdist.environment import describe_environment, interesting_variables


@pytest.fixture(scope="module")
def environment():
    return describe_environment()


def test_the_description_is_json_and_tells_versions_devices_and_machine(environment):
    assert json.loads(json.dumps(environment)) == environment
    assert environment["packages"]["jax"] == metadata.version("jax")
    assert environment["devices"]["count"] == 8
    assert environment["devices"]["process_count"] == 1
    assert environment["cpu"]["usable"] >= 1
    assert environment["memory"]["total_bytes"] > 2**28


def test_the_text_says_what_the_description_says(environment):
    text = env.render(environment)
    assert f"jax                    {metadata.version('jax')}" in text
    assert "GiB" in text
    assert "None" not in text


def test_variables_are_chosen_and_secrets_hidden():
    shown = interesting_variables(
        {
            "XLA_FLAGS": "--xla_a=1",
            "SLURM_JOB_ID": "7",
            "SLURM_JWT": "eyJhbGciOi",
            "JAX_COORDINATOR": "grpc://me:word@host:1",
            "NCCL_AUTH_KEY": "hunter2",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "HTTPS_PROXY": "http://me:word@proxy:1",
            "HF_TOKEN": "hf_abc",
            "AWS_SECRET_ACCESS_KEY": "abc",
            "HOME": "/home/me",
        }
    )
    assert shown == {
        "XLA_FLAGS": "--xla_a=1",
        "SLURM_JOB_ID": "7",
        "SLURM_JWT": "(hidden)",
        "JAX_COORDINATOR": "grpc://(hidden)@host:1",
        "NCCL_AUTH_KEY": "(hidden)",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HTTPS_PROXY": "(set)",
    }


def test_a_jax_that_cannot_start_is_reported_and_not_raised():
    done = subprocess.run(
        [sys.executable, "-m", "launch.env", "--json"],
        capture_output=True, text=True, timeout=60, env={"JAX_PLATFORMS": "no_such_platform", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment = json.loads(done.stdout)
    assert "no_such_platform" in environment["devices"]["error"]
    assert environment["variables"]["JAX_PLATFORMS"] == "no_such_platform"
