from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import threading
import time

import pytest

from launch import attempts as module
from launch.attempts import Attempts, LeaseLostError
from pgdist.errors import ConfigError


def write_lease(attempt, **fields):
    path = attempt.folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def others_process():
    """A process that runs, and is not this one."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def test_attempts_are_numbered_and_the_newest_is_found(tmp_path):
    attempts = Attempts(str(tmp_path))
    assert attempts.newest() is None
    for number in range(3):
        attempt = attempts.claim(job_id="7")
        assert attempt.number == number
        attempt.release()

    assert attempts.numbers() == [0, 1, 2]
    assert attempts.newest().number == 2
    assert attempts.newest().lease()["ended"]


def test_a_live_other_job_is_refused_and_named(tmp_path, others_process):
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    write_lease(first, pid=others_process.pid, started=module.start_time(others_process.pid))

    with pytest.raises(ConfigError, match=f"in use: job 7 .process {others_process.pid} on"):
        attempts.claim(job_id="8")

    assert attempts.numbers() == [0]


def test_the_same_job_takes_its_workdir_back(tmp_path, others_process):
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    write_lease(first, pid=others_process.pid, started=module.start_time(others_process.pid))

    assert attempts.claim(job_id="7").number == 1


def test_the_lease_of_a_process_that_is_gone_is_free_at_once(tmp_path, others_process):
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    write_lease(first, pid=others_process.pid, started=module.start_time(others_process.pid))
    others_process.kill()
    others_process.wait()

    started = time.monotonic()
    assert attempts.claim(job_id="8").number == 1
    assert time.monotonic() - started < 1


def test_a_process_with_the_number_of_the_one_that_is_gone_is_another(tmp_path, others_process):
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    write_lease(first, pid=others_process.pid, started="12")

    assert attempts.claim(job_id="8").number == 1


def test_a_lease_on_another_machine_holds_as_long_as_it_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEASE_SECONDS", 1.0)
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    write_lease(first, host="elsewhere", boot="another")
    first._lease |= {"host": "elsewhere", "boot": "another"}
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            first.keep()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on elsewhere"):
            attempts.claim(job_id="8")
    finally:
        ended.set()
        thread.join()

    assert attempts.claim(job_id="8").number == 1  # silent for a second: over


def test_of_two_that_claim_at_once_one_gets_it(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(claim, [(str(tmp_path), f"job {number}") for number in range(4)], chunksize=1)

    # A pool's process stays, so what it has claimed stays claimed; those that share one take their own back.
    assert len({pid for pid, number in found if number is not None}) == 1


def claim(workdir, job_id):
    time.sleep(0.2)
    try:
        return os.getpid(), Attempts(workdir).claim(job_id=job_id).number
    except ConfigError:
        return os.getpid(), None


def test_an_agent_that_was_overtaken_notices(tmp_path):
    attempts = Attempts(str(tmp_path))
    first = attempts.claim(job_id="7")
    first.keep()
    attempts.claim(job_id="7")

    with pytest.raises(LeaseLostError, match="attempt 1 has begun"):
        first.keep()


def test_a_workdir_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="expected a folder that can be made and written"):
        Attempts(str(tmp_path / "file" / "run")).claim(job_id="7")
