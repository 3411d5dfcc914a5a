"""The roll call over real sockets: nobody goes on before all are there, and whoever is missing is named."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pgdist import roll_call
from pgdist.errors import ConfigError, PeerLostError


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def address() -> tuple[str, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return "localhost", free.getsockname()[1]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said about waiting, which is said often."""
    monkeypatch.setattr(roll_call, "SAY_INTERVAL", 0.5)
    monkeypatch.setattr(roll_call, "_STRAGGLER_SECONDS", 1.0)
    return []


class Roll:
    """Starts the parts of a roll call."""

    def __init__(self, pool, address, *, num_processes: int, timeout: float, said: list[str]) -> None:
        self._start = lambda call, **own: pool.submit(
            call, address, num_processes=num_processes, timeout=timeout, say=said.append, **own
        )

    def take(self):
        return self._start(roll_call.take)

    def answer(self, number: int):
        return self._start(roll_call.answer, process_id=number)


def hello(address: tuple[str, int], **message: object) -> socket.socket:
    """A connection that has said so."""
    end = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(address)
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def test_all_go_on_together_also_when_process_0_comes_last(pool, address, said):
    roll = Roll(pool, address, num_processes=12, timeout=30, said=said)
    others = [roll.answer(number) for number in range(1, 11)]
    time.sleep(1)
    late = roll.answer(11)
    assert not any(other.done() for other in others)
    roll.take().result(timeout=20)
    for other in [*others, late]:
        other.result(timeout=20)
    assert any("process 0 does not answer at localhost" in line for line in said)
    with socket.create_server(address):  # the port is free at once, for JAX
        pass


def test_who_is_missing_is_named_in_all(pool, address, said):
    roll = Roll(pool, address, num_processes=5, timeout=2, said=said)
    for process in [roll.take(), roll.answer(1), roll.answer(3)]:
        with pytest.raises(
            PeerLostError, match="processes 2 and 4 of 5 did not come to localhost:.* within 2 s"
        ):
            process.result(timeout=20)
    assert "Waiting for processes 2 and 4 of 5." in said
    assert any(line.startswith("Waiting to join: processes 2 and 4 did not come") for line in said)


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_coordinator_that_does_not_answer_is_named_with_the_reason(pool, address, said, host):
    roll = Roll(pool, (host, address[1]), num_processes=2, timeout=1, said=said)
    with pytest.raises(
        PeerLostError, match=f"process 1 of 2 .* process 0 does not answer at {host}:.*\\(.+\\)"
    ):
        roll.answer(1).result(timeout=20)


def test_a_process_that_goes_while_others_wait_is_missed_until_it_comes_again(pool, address, said):
    roll = Roll(pool, address, num_processes=3, timeout=30, said=said)
    taking = roll.take()
    hello(address, process=1, processes=3, host="n1").close()
    second = roll.answer(2)
    time.sleep(1)
    assert not taking.done() and not second.done()
    roll.answer(1).result(timeout=20)
    taking.result(timeout=20)


def test_a_process_that_was_told_of_another_number_of_processes_ends_all(pool, address, said):
    roll = Roll(pool, address, num_processes=3, timeout=30, said=said)
    processes = [roll.take(), roll.answer(1)]
    processes.append(Roll(pool, address, num_processes=4, timeout=30, said=said).answer(2))
    for process in processes:
        with pytest.raises(ConfigError, match="process 2 .* was told of 4 processes, but process 0 .* of 3"):
            process.result(timeout=20)


@pytest.mark.parametrize("number", [0, 1])
def test_two_processes_with_one_number_end_all(pool, address, said, number):
    roll = Roll(pool, address, num_processes=3, timeout=30, said=said)
    taking, first = roll.take(), roll.answer(1)
    time.sleep(0.5)
    with hello(address, process=number, processes=3, host="elsewhere") as second:
        for process in (taking, first):
            with pytest.raises(
                ConfigError, match=f"process {number} came twice, from host .* and host elsewhere"
            ):
                process.result(timeout=20)
        last = [json.loads(line) for line in second.makefile()][-1]
        assert last["exit_code"] == 2 and "came twice" in last["error"]


def test_strangers_at_the_port_change_nothing(pool, address, said):
    roll = Roll(pool, address, num_processes=2, timeout=30, said=said)
    taking = roll.take()
    strangers = [hello(address, who="me"), hello(address, process="x", processes=2, host="n")]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100_000)
    silent = socket.create_connection(address)
    roll.answer(1).result(timeout=20)
    taking.result(timeout=20)
    for stranger in [*strangers, silent]:
        stranger.close()


def test_a_taken_port_is_an_error_that_names_it(pool, address, said, monkeypatch):
    monkeypatch.setattr(roll_call, "_PORT_SECONDS", 0.5)
    roll = Roll(pool, address, num_processes=2, timeout=30, said=said)
    with socket.create_server(("", address[1])):
        with pytest.raises(
            ConfigError, match=f"--coordinator: port {address[1]} .* Address already in use.* another"
        ):
            roll.take().result(timeout=20)


def test_a_port_that_is_freed_in_a_moment_is_waited_for(pool, address, said):
    roll = Roll(pool, address, num_processes=1, timeout=30, said=said)
    taken = socket.create_server(("", address[1]))
    timer = threading.Timer(1.0, taken.close)
    timer.start()
    roll.take().result(timeout=20)
    timer.join()


def test_a_long_list_of_processes_is_cut():
    assert roll_call.name_processes([3]) == "process 3"
    assert roll_call.name_processes([5, 1, 2]) == "processes 1, 2 and 5"
    assert roll_call.name_processes(range(64)) == "processes 0, 1, 2, 3, 4, 5, 6 and 57 more"
