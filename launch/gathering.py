"""How the hosts of a job come together before an attempt: the first one's agent tells the others what to start."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable

from launch.attempts import Attempt
from launch.link import AgentLink, Link, NoLink, connect, listen, split_address
from pgdist import files
from pgdist.errors import ConfigError, PeerLostError, Preempted

_TOKEN_SECONDS = 60.0  # until another host must see the first one's file; NFS may cache a missing one for 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """This host in the job.  rendezvous: "host:port" of the first one's agent.  timeout: for all to come, seconds.

    was_stopped: whether this agent has been asked to stop.  say: tells people.
    """

    host: int
    hosts: int
    processes: int
    job_id: str
    rendezvous: str
    timeout: float
    was_stopped: Callable[[], bool]
    say: Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What this host starts.  token: what the first host wrote into the workdir.  coordinator: JAX's, "host:port"."""

    attempt: int
    token: str
    first_process: int
    num_processes: int
    coordinator: str


def gather(place: Place, attempt: Attempt) -> tuple[Link, Plan]:
    """On the first host: waits for the others' agents, and tells them.

    Raises ConfigError, PeerLostError as `listen` does, Preempted where this agent was asked to stop before.
    """
    if place.hosts == 1:
        coordinator = f"127.0.0.1:{_free_port('127.0.0.1')}"
        plan = Plan(
            attempt=attempt.number,
            token=attempt.token,
            first_process=0,
            num_processes=place.processes,
            coordinator=coordinator,
        )
        return NoLink(), plan
    link, hellos = listen(
        place.rendezvous,
        hosts=place.hosts,
        job_id=place.job_id,
        timeout=place.timeout,
        say=place.say,
        gave_up=place.was_stopped,
    )
    if len(hellos) < place.hosts - 1:
        raise _stopped_early()
    counts = [place.processes, *(hellos[host]["processes"] for host in range(1, place.hosts))]
    address, _ = split_address(place.rendezvous)
    plan = Plan(
        attempt=attempt.number,
        token=attempt.token,
        first_process=0,
        num_processes=sum(counts),
        # Another port than the agents', and a new one for each attempt: the last one may still be closing.
        coordinator=f"{f'[{address}]' if ':' in address else address}:{_free_port('')}",
    )
    for host in range(1, place.hosts):
        theirs = dataclasses.replace(plan, first_process=sum(counts[:host]))
        link.send_to(host, kind="start", plan=dataclasses.asdict(theirs))
    return link, plan


def report_to_first_host(place: Place) -> tuple[AgentLink, Plan]:
    """On another host: waits for what the first one says.

    Raises ConfigError where it refuses this host, PeerLostError where it does not answer, Preempted as `gather`.
    """
    hello = {
        "host": place.host,
        "name": socket.gethostname(),
        "processes": place.processes,
        "job_id": place.job_id,
    }
    try:
        link = connect(
            place.rendezvous,
            hello=hello,
            timeout=place.timeout,
            say=place.say,
            gave_up=place.was_stopped,
        )
    except PeerLostError as error:
        raise (_stopped_early() if place.was_stopped() else error) from error
    end = time.monotonic() + place.timeout
    while time.monotonic() < end and not place.was_stopped():
        for message in link.receive():
            if message["kind"] == "start":
                return link, Plan(**message["plan"])
            if message["kind"] == "refused":
                raise ConfigError(f"host 0 refused this one: {message['why']}")
            if message["kind"] in ("given_up", "lost"):
                raise PeerLostError(f"host 0 has not started the job: {message['why']}")
        time.sleep(0.05)
    raise (
        _stopped_early()
        if place.was_stopped()
        else PeerLostError(f"host 0 did not start the job within {place.timeout:g} s")
    )


def check_shared(place: Place, attempt: Attempt, *, workdir: str, token: str) -> str:
    """What is wrong where this host does not see the first one's workdir; "" where it does."""
    end = time.monotonic() + min(_TOKEN_SECONDS, place.timeout)
    while attempt.token != token:
        if time.monotonic() > end:
            return (
                f"host {place.host} ({socket.gethostname()}) does not see in --workdir={workdir} what host 0 has "
                "written there: it must lie on a filesystem that all hosts share, under one path"
            )
        if not files.is_url(workdir):
            with contextlib.suppress(OSError):
                os.listdir(os.path.dirname(os.path.expanduser(workdir)) or ".")  # makes NFS look again
        time.sleep(0.2)
    return ""


def _stopped_early() -> Preempted:
    return Preempted("Asked to stop before all hosts had come; nothing was started.")


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]
