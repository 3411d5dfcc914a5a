"""How the agents of a job know of one another: the first host's listens, the others hold a connection to it.

One JSON object a line. A beat goes both ways every second, so that a host which is gone, asleep or cut off is
noticed within seconds, whatever the network says of its connection. The first host passes on what concerns all.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from pgdist.errors import ConfigError, PeerLostError

BEAT_INTERVAL = 1.0
LOST_AFTER = 6.0  # seconds without a beat: with what follows, a lost host ends all others within 10 s
_CONNECT_INTERVAL = 0.5
_SAY_INTERVAL = 10.0

Message = dict[str, Any]


class Link(Protocol):
    """Messages between the agents; the first host's `send` reaches all others, another's the first."""

    def send(self, **message: Any) -> None:
        """Sends to whoever is still there; never blocks for long and raises nothing."""

    def receive(self) -> Iterable[Message]:
        """What has come since, each with its `host`; {"kind": "lost"} once for a host that is gone."""

    def close(self) -> None:
        """Ends all connections."""


class NoLink:
    """The link of a job on one host."""

    def send(self, **message: Any) -> None:
        """There is nobody."""

    def receive(self) -> list[Message]:
        """There is nobody."""
        return []

    def close(self) -> None:
        """Nothing is open."""


class _Connection:
    """One connection and the thread that reads it."""

    def __init__(self, sock: socket.socket, host: int, inbox: queue.Queue[Message]) -> None:
        self.host = host
        self.last_heard = time.monotonic()
        self.is_lost = False
        self._socket = sock
        self._inbox = inbox
        self._sending = threading.Lock()
        sock.settimeout(LOST_AFTER)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self, lines: Any) -> None:
        threading.Thread(target=self._read, args=(lines,), daemon=True, name=f"link-{self.host}").start()

    def deliver_to(self, inbox: queue.Queue[Message]) -> None:
        self._inbox = inbox

    def send(self, message: Message) -> None:
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the reader will say so

    def close(self) -> None:
        self.is_lost = True  # of our own will: not to be told
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, lines: Any) -> None:
        try:
            for line in lines:
                self.last_heard = time.monotonic()
                message = json.loads(line)
                if message["kind"] != "beat":
                    self._inbox.put(message | {"host": self.host})
            self.lose("its connection was closed")
        except (OSError, ValueError) as error:
            self.lose(f"its connection failed: {error}")

    def lose(self, why: str) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._inbox.put({"kind": "lost", "host": self.host, "why": why})


class AgentLink:
    """The connections of one agent: of the first host to all others, or of another to the first."""

    def __init__(self, connections: list[_Connection], inbox: queue.Queue[Message]) -> None:
        self._connections = connections
        self._inbox = inbox
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="link-beat").start()

    def send(self, **message: Any) -> None:
        """Sends to all that are still there."""
        for connection in self._connections:
            connection.send(message)

    def send_to(self, host: int, **message: Any) -> None:
        """Sends to one host."""
        for connection in self._connections:
            if connection.host == host:
                connection.send(message)

    def receive(self) -> Iterator[Message]:
        """What has come; what the caller does not take stays for the next call."""
        for connection in self._connections:
            if time.monotonic() - connection.last_heard > LOST_AFTER:
                connection.lose(f"nothing was heard of it for {LOST_AFTER:g} s")
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()

    def close(self) -> None:
        """Ends all connections."""
        self._closed.set()
        for connection in self._connections:
            connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_INTERVAL):
            self.send(kind="beat")


def listen(
    address: str,
    *,
    hosts: int,
    job_id: str,
    timeout: float,
    say: Callable[[str], None],
    gave_up: Callable[[], bool],
) -> tuple[AgentLink, dict[int, Message]]:
    """The first host's link, once all `hosts` - 1 others have come; and what each said of itself.

    Raises ConfigError for an address that cannot be listened on, PeerLostError that names the hosts which have
    not come within `timeout` seconds.
    """
    _, port = split_address(address)
    inbox: queue.Queue[Message] = queue.Queue()
    connections: dict[int, _Connection] = {}
    hellos: dict[int, Message] = {}
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=hosts)
    except OSError as error:
        raise ConfigError(
            f"--rendezvous={address}: cannot listen on port {port}: {error.strerror or error}. Give another port."
        ) from error
    with server:
        server.settimeout(_CONNECT_INTERVAL)
        started = said = time.monotonic()
        while len(connections) < hosts - 1 and not gave_up():
            now = time.monotonic()
            for host in [host for host, connection in connections.items() if connection.is_lost]:
                del connections[host], hellos[host]  # it may come again: a pod that was restarted
            missing = ", ".join(str(host) for host in range(1, hosts) if host not in connections)
            if now - started > timeout:
                for connection in connections.values():
                    connection.send({"kind": "given_up", "why": f"host {missing} has not come"})
                    connection.close()
                raise PeerLostError(
                    f"host {missing} of {hosts} has not come to {address} within {timeout:g} s: is its agent "
                    "running, and can it reach this host?"
                )
            if now - said > _SAY_INTERVAL:
                say(f"waiting for host {missing} of {hosts} at {address}")
                said = now
            _accept(server, connections, hellos, inbox=inbox, hosts=hosts, job_id=job_id)
    return AgentLink(list(connections.values()), _without_replaced(inbox, connections)), hellos


def _without_replaced(
    inbox: queue.Queue[Message], connections: dict[int, _Connection]
) -> queue.Queue[Message]:
    """The messages but for the loss of a host that has come again since."""
    kept: queue.Queue[Message] = queue.Queue()
    for connection in connections.values():
        connection.deliver_to(kept)
    with contextlib.suppress(queue.Empty):
        while True:
            message = inbox.get_nowait()
            connection = connections.get(message["host"])
            if message["kind"] != "lost" or (connection is not None and connection.is_lost):
                kept.put(message)
    return kept


def _accept(
    server: socket.socket,
    connections: dict[int, _Connection],
    hellos: dict[int, Message],
    *,
    inbox: queue.Queue[Message],
    hosts: int,
    job_id: str,
) -> None:
    """Takes one connection in, if one comes and is of this job."""
    try:
        sock, _ = server.accept()
    except TimeoutError:
        return
    try:
        sock.settimeout(LOST_AFTER)
        lines = sock.makefile("r", encoding="utf-8")
        hello = json.loads(lines.readline())
        host = int(hello["host"])
    except (OSError, ValueError, KeyError, TypeError):
        sock.close()  # no agent
        return
    why = ""
    if hello.get("job_id") != job_id:
        why = f"job {hello.get('job_id')} came to the port of job {job_id}"
    elif not 0 < host < hosts:
        why = f"--host={host}: expected 1 to {hosts - 1} for --hosts={hosts}"
    elif host in connections:
        why = f"--host={host} is there already, on {hellos[host]['name']}: two hosts have the same number"
    connection = _Connection(sock, host, inbox)
    if why:
        connection.send({"kind": "refused", "why": why})
        connection.close()
        return
    connection.start(lines)
    connections[host], hellos[host] = connection, hello


def connect(
    address: str,
    *,
    hello: Message,
    timeout: float,
    say: Callable[[str], None],
    gave_up: Callable[[], bool],
) -> AgentLink:
    """Another host's link to the first, which is retried while its name or port is not there yet.

    Raises PeerLostError after `timeout` seconds.
    """
    target = split_address(address)
    started = said = time.monotonic()
    while True:
        try:
            sock = socket.create_connection(target, timeout=LOST_AFTER)
            break
        except OSError as error:  # gaierror, too: in a young cluster names come later than machines
            now = time.monotonic()
            why = error.strerror or str(error)
            if now - started > timeout or gave_up():
                raise PeerLostError(
                    f"--rendezvous={address}: the first host's agent did not answer within {timeout:g} s ({why})"
                ) from error
            if now - said > _SAY_INTERVAL:
                say(f"waiting for the first host's agent at {address} ({why})")
                said = now
            time.sleep(_CONNECT_INTERVAL)
    inbox: queue.Queue[Message] = queue.Queue()
    connection = _Connection(sock, 0, inbox)
    sock.settimeout(None)  # the others may take long to come; from then on there are beats
    connection.send(hello)
    connection.last_heard = time.monotonic() + timeout
    connection.start(sock.makefile("r", encoding="utf-8"))
    return AgentLink([connection], inbox)


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port".  Raises ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--rendezvous: expected HOST:PORT, such as node0:8476, found {address!r}")
    return host.strip("[]"), int(port)
