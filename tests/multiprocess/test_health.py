"""The health check of real jobs: alike ones pass; any difference ends all processes with code 2 and is named."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from pgdist import cluster, health
from tests.multiprocess.processes import ROOT, Processes

pytestmark = [pytest.mark.multiprocess]

CHECK = ("-m", "launch.env", "--check")
THIS = ("-m", "tests.multiprocess.test_health")
HERE = f"host {socket.gethostname()}"


def assert_all_end_with_2_and_say(job: Processes, message: str) -> None:
    assert job.codes() == [2] * job.count, job.tails()
    for number in range(job.count):
        assert message in job.output(number), job.output(number)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_are_alike_are_healthy(tmp_path, count):
    with Processes(tmp_path, count=count) as job:
        for number in range(count):
            job.start(number, *CHECK)
        assert job.codes() == [0] * count, job.tails()
        lines = job.output(0).splitlines()
        assert lines[-1] == "The job is healthy."
        assert f"processes: {count} on 1 host ({socket.gethostname()})" in lines
        assert f"devices: {2 * count} (cpu), seen by all processes; 2 of them here" in lines
        assert any(f"sum over all devices: {count * (2 * count + 1)}, as expected" in line for line in lines)
        assert "healthy" not in job.output(1)


def test_other_code_is_named_by_its_file(tmp_path):
    copy = tmp_path / "copy"
    for package in ("pgdist", "launch"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "pgdist" / "mesh.py").open("a").write("# changed\n")
    with Processes(tmp_path, count=2) as job:
        job.start(0, *CHECK)
        job.start(1, *CHECK, path=[copy])
        assert_all_end_with_2_and_say(job, f"process 1 ({HERE}): code pgdist/mesh.py is ")
        assert job.output(0).count(": code ") == 1


def test_another_library_version_is_named(tmp_path):
    installed = tmp_path / "installed" / "orbax_checkpoint-0.11.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: orbax-checkpoint\nVersion: 0.11.0\n")
    with Processes(tmp_path, count=3) as job:
        for number in (0, 1):
            job.start(number, *CHECK)
        job.start(2, *CHECK, path=[installed.parent])
        message = f"process 2 ({HERE}): library orbax-checkpoint is 0.11.0, but "
        assert_all_end_with_2_and_say(job, message)
        assert f" in process 0 ({HERE})" in job.output(1)


def test_a_clock_that_is_off_is_named(tmp_path):
    (tmp_path / "late").mkdir()
    shift = "import time\nnow = time.time\ntime.time = lambda: now() + 60\n"
    (tmp_path / "late" / "sitecustomize.py").write_text(shift)
    with Processes(tmp_path, count=2) as job:
        job.start(0, *CHECK)
        job.start(1, *CHECK, path=[tmp_path / "late"])
        assert_all_end_with_2_and_say(job, f"process 1 ({HERE}): clock is 60 s ahead of process 0")


def test_another_number_of_devices_is_no_difference(tmp_path):
    with Processes(tmp_path, count=2) as job:
        job.start(0, *CHECK)
        job.start(1, *CHECK, variables={"PGDIST_FAKE_DEVICES": "3"})
        assert job.codes() == [0, 0], job.tails()
        assert "devices: 5 (cpu), seen by all processes; 2 of them here" in job.output(0)


def test_another_config_is_named_by_its_field(tmp_path):
    with Processes(tmp_path, count=2) as job:
        job.start(0, *THIS, "config", "1")
        job.start(1, *THIS, "config", "2")
        assert_all_end_with_2_and_say(
            job, f"process 1 ({HERE}): config.seed is 2, but 1 in process 0 ({HERE})"
        )


def test_other_inputs_are_named(tmp_path):
    with Processes(tmp_path, count=2) as job:
        job.start(0, *THIS, "inputs", "12 examples, sha256 ab")
        job.start(1, *THIS, "inputs", "13 examples, sha256 cd")
        message = "training data is 13 examples, sha256 cd, but 12 examples, sha256 ab in process 0"
        assert_all_end_with_2_and_say(job, message)


def test_a_process_that_never_checks_is_named(tmp_path):
    with Processes(tmp_path, count=3) as job:
        for number in (0, 1):
            job.start(number, *THIS, "check", "4")
        job.start(2, *THIS, "sleep", "40")
        assert 43 in job.codes(), job.tails()
        assert "health check (health): waited 4 s for process 2 on" in job.output(0)


def test_devices_that_cannot_add_up_end_all_within_the_time(tmp_path):
    with Processes(tmp_path, count=2) as job:
        job.start(0, *THIS, "check", "6")
        job.start(1, *THIS, "no-sum", "6")  # its devices never take part, as behind a firewall
        assert job.codes()[0] == 43, job.tails()
        assert "cannot add up a number over all devices" in job.output(0)


def main(what: str, value: str) -> None:
    import time

    from launch import membership
    from pgdist.config import default_config

    membership.join_job()
    config = default_config()
    if what == "sleep":
        time.sleep(float(value))
    elif what == "config":
        config.seed = int(value)
        health.check(config)
    elif what == "inputs":
        health.check(config)
        health.compare({"training data": value}, name="inputs")
    else:
        if what == "no-sum":
            health._device_sum = lambda: time.sleep(60)
        health.check(config, seconds=float(value))
    cluster.leave()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from launch import entry

    entry.run(main, name="job", usage="", positional="WHAT VALUE")
