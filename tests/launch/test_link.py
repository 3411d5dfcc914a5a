from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from launch import link as module
from launch.link import connect, listen
from pgdist.errors import ConfigError, PeerLostError


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def hello(host, job_id="7"):
    return {"host": host, "name": f"n{host}", "processes": 2, "job_id": job_id}


def connection_to(address):
    """A bare connection, as soon as somebody listens."""
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(module.split_address(address))
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


def quiet(text):
    del text


def listening(address, *, hosts, timeout=10.0, said=None):
    """Listens in a thread; what came of it."""
    found = {}

    def run():
        try:
            found["link"], found["hellos"] = listen(
                address,
                hosts=hosts,
                job_id="7",
                timeout=timeout,
                say=said.append if said is not None else quiet,
                gave_up=lambda: False,
            )
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    return found, thread


def joined(address, host, **named):
    return connect(address, hello=hello(host, **named), timeout=10, say=quiet, gave_up=lambda: False)


def received(link, *, count=1, seconds=5.0):
    found, end = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found += link.receive()
        time.sleep(0.01)
    return found


@pytest.fixture
def three():
    """The links of three hosts."""
    address = free_address()
    found, thread = listening(address, hosts=3)
    others = [joined(address, host) for host in (1, 2)]
    thread.join(10)
    links = [found["link"], *others]
    yield links, found["hellos"]
    for link in links:
        link.close()


def test_the_first_host_knows_the_others_and_reaches_all_or_one(three):
    (first, one, two), hellos = three
    assert {host: told["name"] for host, told in hellos.items()} == {1: "n1", 2: "n2"}

    first.send(kind="stop")
    first.send_to(2, kind="start", attempt=3)
    two.send(kind="ended", codes=[0])

    assert received(one) == [{"kind": "stop", "host": 0}]
    assert received(two, count=2) == [{"kind": "stop", "host": 0}, {"kind": "start", "attempt": 3, "host": 0}]
    assert received(first) == [{"kind": "ended", "codes": [0], "host": 2}]


def test_an_agent_that_is_gone_is_told_once_and_at_once(three):
    (first, one, two), _ = three
    started = time.monotonic()
    one.close()

    (message,) = received(first)
    assert message["kind"] == "lost" and message["host"] == 1
    assert time.monotonic() - started < 1
    assert received(first, seconds=0.5) == [] and received(two, seconds=0.5) == []


def test_an_agent_that_falls_silent_is_lost_although_its_connection_stands(monkeypatch):
    monkeypatch.setattr(module, "LOST_AFTER", 1.5)
    address = free_address()
    found, thread = listening(address, hosts=2)
    with connection_to(address) as silent:
        silent.sendall(json.dumps(hello(1)).encode() + b"\n")
        thread.join(10)
        (message,) = received(found["link"])

    assert message["kind"] == "lost"
    found["link"].close()


def test_the_first_host_may_come_last(monkeypatch):
    monkeypatch.setattr(module, "_SAY_INTERVAL", 0.2)
    address, said = free_address(), []
    links = {}

    def join():
        links[1] = connect(address, hello=hello(1), timeout=20, say=said.append, gave_up=lambda: False)

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(1.2)
    found, listener = listening(address, hosts=2)
    thread.join(10)
    listener.join(10)

    assert said and f"waiting for the first host's agent at {address}" in said[0]
    links[1].close()
    found["link"].close()


def test_hosts_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(module, "_SAY_INTERVAL", 0.2)
    address, said = free_address(), []
    found, thread = listening(address, hosts=4, timeout=1.5, said=said)
    two = joined(address, 2)
    thread.join(10)

    assert isinstance(found["error"], PeerLostError)
    assert "host 1, 3 of 4 has not come" in str(found["error"])
    assert any("waiting for host 1, 3 of 4" in line for line in said)
    assert received(two)[0]["kind"] == "given_up"
    two.close()


def test_a_host_that_comes_again_while_others_are_awaited_is_taken_in():
    address = free_address()
    found, thread = listening(address, hosts=3)
    gone = joined(address, 1)
    time.sleep(0.3)
    gone.close()
    time.sleep(0.7)
    one, two = joined(address, 1), joined(address, 2)
    thread.join(10)

    one.send(kind="ended", codes=[0])
    assert received(found["link"], seconds=1.0) == [{"kind": "ended", "codes": [0], "host": 1}]
    for link in (found["link"], one, two):
        link.close()


def test_a_first_host_that_does_not_answer_is_named():
    address = free_address()

    with pytest.raises(
        PeerLostError, match=f"rendezvous={address}.*did not answer within 1 s .Connection refused"
    ):
        connect(address, hello=hello(1), timeout=1, say=quiet, gave_up=lambda: False)


def test_a_port_that_is_taken_is_a_mistake():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found, thread = listening(address, hosts=2)
        thread.join(10)

    assert isinstance(found["error"], ConfigError)
    assert "Address already in use" in str(found["error"]) and "Give another port" in str(found["error"])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (hello(1, job_id="8"), "job 8 came to the port of job 7"),
        (hello(5), "--host=5: expected 1 to 1"),
        (hello(0), "--host=0: expected 1 to 1"),
    ],
)
def test_a_stranger_is_refused_and_told_why(wrong, why):
    address = free_address()
    found, thread = listening(address, hosts=2)
    stranger = connect(address, hello=wrong, timeout=10, say=quiet, gave_up=lambda: False)
    (message, *_) = received(stranger)
    assert message["kind"] == "refused" and why in message["why"]
    with connection_to(address) as babbler:
        babbler.sendall(b"GET / HTTP/1.1\r\n\r\n")
        right = joined(address, 1)
        thread.join(10)

    assert found["hellos"][1]["name"] == "n1"
    for link in (stranger, right, found["link"]):
        link.close()


@pytest.mark.parametrize("address", ["host", "host:", ":1", "host:0", "host:port", "host:70000"])
def test_an_address_without_host_or_port_is_a_mistake(address):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        module.split_address(address)
