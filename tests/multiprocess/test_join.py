"""Joining with real processes: late ones are waited for, missing and lost ones are named, and nobody hangs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest

from pgdist import cluster
from tests.multiprocess.processes import Processes, free_port

pytestmark = [pytest.mark.multiprocess]

CHECK = ("-m", "launch.env", "--check")
THIS = ("-m", "tests.multiprocess.test_join")


def test_a_coordinator_that_starts_five_seconds_after_the_others_is_joined(tmp_path):
    with Processes(tmp_path, count=3) as job:
        for number in (1, 2):
            job.start(number, *CHECK)
        time.sleep(5)
        job.start(0, *CHECK)
        assert job.codes() == [0, 0, 0], job.tails()


def test_a_process_that_does_not_come_is_named_by_all_others(tmp_path):
    with Processes(tmp_path, count=4) as job:
        for number in (0, 1, 3):
            job.start(number, *CHECK, "--join_timeout=12")
        assert job.codes() == [43, 43, 43], job.tails()
        for number in (0, 1, 3):
            assert f"process 2 of 4 did not come to {job.address} within 12 s" in job.output(number)
        assert "Waiting for process 2 of 4." in job.output(0)  # said on the way


def test_a_taken_port_ends_the_coordinator_with_code_2_and_is_named(tmp_path):
    with socket.create_server(("", port := free_port())), Processes(tmp_path, count=2, port=port) as job:
        job.start(0, *CHECK)
        assert job.codes() == [2], job.tails()
        assert f"port {port} of this host" in job.output(0) and "Give another port" in job.output(0)


def test_a_proxy_that_would_make_joining_hang_is_bypassed_and_told(tmp_path):
    nowhere = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": "elsewhere"}
    with Processes(tmp_path, count=2) as job:
        for number in (0, 1):
            job.start(number, *CHECK, variables=nowhere)
        assert job.codes() == [0, 0], job.tails()
        assert "http_proxy is set, and the coordinator localhost is reached without it" in job.output(1)


def test_nobody_joins_where_two_processes_have_one_number(tmp_path):
    with Processes(tmp_path, count=3) as job:
        job.start(0, *CHECK)
        job.start(1, *CHECK)
        job.start(2, *CHECK, "--process_id=1")
        assert job.codes() == [2, 2, 2], job.tails()
        assert all("process 1 came twice" in job.output(number) for number in (0, 1, 2))


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others_within_ten_seconds_without_an_agent(tmp_path, lost, number):
    with Processes(tmp_path, count=3) as job:
        processes = [job.start(other, *THIS, "sleep") for other in range(3)]
        job.wait_for("joined", numbers=range(3))
        os.kill(processes[lost].pid, number)
        hit = time.monotonic()
        others = [other for other in range(3) if other != lost]
        for other in others:
            processes[other].wait(timeout=30)
        assert time.monotonic() - hit < 10
        # JAX aborts them, and lets nobody say what ends them.
        assert [processes[other].returncode for other in others] == [-signal.SIGABRT] * 2, job.tails()


def test_a_barrier_gives_up_and_names_who_has_not_come(tmp_path):
    with Processes(tmp_path, count=4) as job:
        for number in range(4):
            job.start(number, *THIS, "barrier")
        codes = job.codes()
        assert codes[0] == codes[2] == 43, job.tails()
        expected = f"half way: waited 3 s for processes 1 and 3 on {socket.gethostname()}."
        assert expected in job.output(0) and expected in job.output(2)


def test_texts_are_exchanged_with_and_without_the_service(tmp_path):
    with Processes(tmp_path, count=3) as job:
        for number in range(3):
            job.start(number, *THIS, "texts")
        assert job.codes() == [0, 0, 0], job.tails()


def _barrier(process: int) -> None:
    cluster.barrier("half way", seconds=30)
    if process in (1, 3):
        time.sleep(60)
    cluster.barrier("half way", seconds=3)


def _texts(process: int) -> None:
    texts = ["é" * 5, "", "x" * 100_000]
    for name in ("with", "without"):
        if name == "without":
            cluster._service = lambda: None  # a JAX that has moved it
        gathered = cluster.gather(name, texts[process], seconds=30)
        assert gathered == (texts if process == 0 or name == "without" else [])
        assert cluster.announce(name, texts[process], seconds=30) == texts[0]
        cluster.barrier("after texts")


def main() -> None:
    from launch import membership

    membership.join_job()
    print("joined", file=sys.stderr, flush=True)
    process = int(os.environ["PGDIST_PROCESS_ID"])
    {"barrier": _barrier, "texts": _texts, "sleep": lambda process: time.sleep(60)}[sys.argv[-1]](process)
    cluster.leave()


if __name__ == "__main__":
    from launch import entry

    entry.run(lambda *arguments: main(), name="job", usage="", positional="WHAT")
