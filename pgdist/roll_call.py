"""The roll call of a job: process 0 waits at the coordinator's port until all others have come, then all go on.

JAX's own joining aborts a process (code 134) when a peer is missing and says neither which nor why, and crashes
when the port is taken. So before it everybody meets here, on the same port, where whoever is missing is named.

Lines of JSON over TCP. A process says {"process": 3, "processes": 4, "host": "n2"}; process 0 says every few
seconds {"waiting_for": [1, 2]}, and at last {"go": true} or {"error": "...", "exit_code": 2}. Needs no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from pgdist.errors import ConfigError, PeerLostError, UserError

SAY_INTERVAL = 10.0  # seconds between two lines about who is missing

_RETRY_INTERVAL = 0.25
_CONNECT_SECONDS = 5.0
_STRAGGLER_SECONDS = 5.0
_PORT_SECONDS = 10.0  # that a process of the attempt before may still hold the port
_SILENCE_SECONDS = 3 * SAY_INTERVAL  # of process 0, after which it is looked for anew
_LONGEST_LINE = 4096  # bytes

Say = Callable[[str], None]


def take(address: tuple[str, int], *, num_processes: int, timeout: float, say: Say) -> None:
    """Process 0's part: returns when all the others have come.

    address: where they look for it.  say: told every ten seconds who is missing.
    Raises ConfigError where the port is taken and where processes contradict each other, PeerLostError that
    names who has not come within `timeout` seconds; all who have come raise the same.
    """
    end = time.monotonic() + timeout
    with contextlib.closing(_Roll(_listen(address[1]), num_processes=num_processes)) as roll:
        try:
            roll.wait(end, address, timeout=timeout, say=say)
            _reach_itself(address, end)
        except UserError as error:
            if isinstance(error, ConfigError):
                roll.wait_for_stragglers()
            roll.tell_all({"error": str(error), "exit_code": error.exit_code})
            raise
        roll.tell_all({"go": True})


def answer(
    address: tuple[str, int], *, process_id: int, num_processes: int, timeout: float, say: Say
) -> None:
    """The part of the others: finds process 0, while its name or port is not there yet too, and waits for its word.

    Raises what `take` raises there, and PeerLostError after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    hello = {"process": process_id, "processes": num_processes, "host": socket.gethostname()}
    state = _Waiting(address=address, say=say)
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, timeout=_CONNECT_SECONDS) as connection:
                connection.sendall(_line(hello))
                if _hear(connection, end + _CONNECT_SECONDS, state):  # so that its word comes first
                    return
                state.why = "process 0 has gone again"
        except OSError as error:  # gaierror too: in a young cluster names come later than machines
            state.why = error.strerror or str(error)
        state.tell()
        time.sleep(_RETRY_INTERVAL)
    raise PeerLostError(
        f"process {process_id} of {num_processes} has not joined the job within {timeout:g} s: {state.describe()}."
    )


def name_processes(numbers: Iterable[int]) -> str:
    """`process 3`, `processes 1, 2 and 5`; a long list is cut."""
    names = [str(number) for number in sorted(numbers)]
    shown = names if len(names) <= 8 else [*names[:7], f"{len(names) - 7} more"]
    if len(shown) == 1:
        return f"process {shown[0]}"
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


class _Roll:
    """Who has come so far; a connection to each of them."""

    def __init__(self, server: socket.socket, *, num_processes: int) -> None:
        self._server = server
        self._num_processes = num_processes
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._heard: dict[socket.socket, bytes] = {}
        self._present: dict[int, tuple[socket.socket, str]] = {}  # by number: connection, host

    def missing(self) -> list[int]:
        """The numbers of those who have not come."""
        return [number for number in range(1, self._num_processes) if number not in self._present]

    def wait(self, end: float, address: tuple[str, int], *, timeout: float, say: Say) -> None:
        """Returns when all are here; see `take`."""
        said = time.monotonic()
        while missing := self.missing():
            self._look()
            now = time.monotonic()
            if now >= end:
                raise PeerLostError(
                    f"{name_processes(missing)} of {self._num_processes} did not come to "
                    f"{_written(address)} within {timeout:g} s. Look at their logs; were they started, and can "
                    "they reach this address?"
                )
            if now - said >= SAY_INTERVAL:
                said = now
                say(f"Waiting for {name_processes(missing)} of {self._num_processes}.")
                self._send({"waiting_for": missing})

    def wait_for_stragglers(self) -> None:
        """Lets those in who come a little later, so that they are told of the mistake, too."""
        end = time.monotonic() + _STRAGGLER_SECONDS
        while self.missing() and time.monotonic() < end:
            with contextlib.suppress(ConfigError):  # one is enough
                self._look()

    def tell_all(self, message: dict[str, Any]) -> None:
        """The last word to everybody; they hang up, so that the port is free at once."""
        self._send(message)
        end = time.monotonic() + _CONNECT_SECONDS
        for connection, _ in self._present.values():
            with contextlib.suppress(OSError):
                connection.settimeout(max(0.01, end - time.monotonic()))
                while connection.recv(_LONGEST_LINE):
                    pass

    def close(self) -> None:
        """Frees the port."""
        for connection in self._heard:
            connection.close()
        self._selector.close()
        self._server.close()

    def _look(self) -> None:
        for key, _ in self._selector.select(timeout=_RETRY_INTERVAL):
            if key.fileobj is self._server:
                self._accept()
            else:
                self._receive(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._heard[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._heard[connection] += data
        line, is_whole, _ = self._heard[connection].partition(b"\n")
        if not data or len(line) > _LONGEST_LINE:
            self._drop(connection)
        elif is_whole:
            self._enter(connection, line)

    def _enter(self, connection: socket.socket, line: bytes) -> None:
        try:
            hello = json.loads(line)
            number, count, host = int(hello["process"]), int(hello["processes"]), str(hello["host"])
        except (ValueError, KeyError, TypeError):
            self._drop(connection)  # none of ours
            return
        known = self._present.setdefault(number, (connection, host))
        if count != self._num_processes:
            raise ConfigError(
                f"process {number} (host {host}) was told of {count} processes, but process 0 (host "
                f"{socket.gethostname()}) of {self._num_processes}: --num_processes must be the same in all."
            )
        if known[0] is not connection or not 0 < number < count:
            raise ConfigError(
                f"process {number} came twice, from host {known[1] if number else socket.gethostname()} and host "
                f"{host}: every process needs a --process_id of its own, from 0 to {self._num_processes - 1}."
            )

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._heard[connection]
        self._present = {n: known for n, known in self._present.items() if known[0] is not connection}
        connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._heard:
            with contextlib.suppress(OSError):  # it will be missed
                connection.sendall(_line(message))


@dataclasses.dataclass(kw_only=True)
class _Waiting:
    """What a process that waits knows, and when it last said so."""

    address: tuple[str, int]
    say: Say
    why: str = ""
    missing: str = ""
    said: float = dataclasses.field(default_factory=time.monotonic)

    def describe(self) -> str:
        if self.missing:
            return f"{self.missing} did not come to process 0 at {_written(self.address)}"
        return f"process 0 does not answer at {_written(self.address)} ({self.why or 'no word from it'})"

    def tell(self) -> None:
        if time.monotonic() - self.said >= SAY_INTERVAL:
            self.said = time.monotonic()
            self.say(f"Waiting to join: {self.describe()}.")


def _hear(connection: socket.socket, end: float, state: _Waiting) -> bool:
    """Whether process 0 says to go on; False where it has gone, or `end` has come."""
    heard = b""
    last = time.monotonic()
    connection.settimeout(_RETRY_INTERVAL)
    while (now := time.monotonic()) < end and now - last < _SILENCE_SECONDS:
        try:
            data = connection.recv(_LONGEST_LINE)
        except TimeoutError:
            continue
        if not data:
            return False
        last = now
        heard += data
        *lines, heard = heard.split(b"\n")
        for message in map(_parse, lines):
            if message.get("go"):
                return True
            if "error" in message:
                raise (
                    ConfigError(message["error"])
                    if message.get("exit_code") == 2
                    else PeerLostError(message["error"])
                )
            if message.get("waiting_for"):
                state.missing = name_processes(message["waiting_for"])
                state.tell()
    return False


def _listen(port: int) -> socket.socket:
    """A socket on all addresses of this host."""
    end = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
                )
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= end:
                # A port that an agent chose was free a moment ago, and the next attempt gets another.
                kind = PeerLostError if "PGDIST_ATTEMPT" in os.environ else ConfigError
                raise kind(
                    f"--coordinator: port {port} of this host ({socket.gethostname()}) cannot be listened on: "
                    f"{error.strerror or error}. Give another port, the same in all processes."
                ) from error
        time.sleep(_RETRY_INTERVAL)


def _reach_itself(address: tuple[str, int], end: float) -> None:
    """Process 0 is a client of its own service, too: its name must be known here as well."""
    while True:
        try:
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise PeerLostError(
                    f"process 0 (host {socket.gethostname()}) cannot reach itself at {_written(address)}: "
                    f"{error.strerror or error}. --coordinator must name this host."
                ) from error
        time.sleep(_RETRY_INTERVAL)


def _written(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    """The message in a line; {} where there is none, as from a server of another kind."""
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    return {}
