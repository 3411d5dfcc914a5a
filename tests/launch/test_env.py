"""What a bug report contains, and that it contains no secrets."""

import json
import os
import resource
import subprocess
import sys
from importlib import metadata

import pytest

from launch import env
from pgdist import limits
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
    assert environment["limits"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert environment["limits"].keys() > {"locked_memory_bytes", "processes", "cpus", "memory_bytes"}


def test_the_text_says_what_the_description_says(environment):
    text = env.render(environment)
    assert f"jax                      {metadata.version('jax')}" in text
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


def run_env(*arguments, **variables):
    done = subprocess.run(
        [sys.executable, "-m", "launch.env", *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | variables,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_job_that_a_command_would_join_is_told_with_the_reason():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    _, out, _ = run_env("--json", SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="1(x2)", **slurm)
    job = json.loads(out)["job"]
    assert (job["would_join_as"], job["because_of"]) == ("process 1 of 2", "a Slurm step")
    assert job["coordinator"].startswith("n1:")

    code, out, _ = run_env("--coordinator=n1:80")
    assert code == 0 and "--num_processes and --process_id missing" in out


def test_the_check_of_one_process_passes_and_prints_a_line_a_fact():
    code, out, err = run_env("--check", PGDIST_FAKE_DEVICES="3")
    assert code == 0, err
    assert (
        "devices: 3 (cpu), seen by all processes; 3 of them here\nsum over all devices: 6, as expected" in out
    )
    assert out.endswith("\nThe job is healthy.\n")


def test_a_variable_for_simulated_devices_that_is_no_number_is_named():
    code, out, err = run_env("--check", PGDIST_FAKE_DEVICES="many")
    assert (code, out) == (2, "") and "PGDIST_FAKE_DEVICES: expected a whole number, found 'many'" in err


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({"job/cpu.max": "150000 100000", "cpu.max": "max 100000", "job/step/memory.max": "1000"}, 1.5, 1000),
        ({"job/step/cpu.max": "max 100000", "memory.max": "7", "job/memory.max": "max"}, None, 7),
        ({}, None, None),
    ],
)
def test_the_limits_of_all_control_groups_around_a_process_hold(tmp_path, monkeypatch, files, cpus, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_memberships", lambda: ["0::/job/step"])
    found = limits.describe_limits()
    assert (found["cpus"], found["memory_bytes"]) == (cpus, memory)


def test_the_limits_of_the_older_kind_of_control_groups_hold(tmp_path, monkeypatch):
    for name, text in {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")  # none
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_memberships", lambda: ["4:memory:/", "2:cpu,cpuacct:/a", "0::/"])
    found = limits.describe_limits()
    assert (found["cpus"], found["memory_bytes"]) == (0.5, None)
