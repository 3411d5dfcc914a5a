"""Joining and leaving a job of one or several processes, and what they tell each other outside of training.

One process needs none of JAX's distributed service; several need `join` before anything touches a device.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pgdist import roll_call
from pgdist.detection import (
    HEARTBEAT_TIMEOUT,
    JOIN_TIMEOUT,
    Membership,
    find_membership,
    split_address,
)
from pgdist.errors import PeerLostError, UserError

_SECONDS_AFTER_ROLL_CALL = 60  # for joining, when all are known to be there

_barriers: collections.Counter[str] = collections.Counter()  # how often each name was waited at


def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: str | None = None,
    join_timeout: float = JOIN_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> Membership:
    """Joins the job that the arguments, the environment or the cluster tell of; see `find_membership`.

    join_timeout: seconds in which all processes must come.  heartbeat_timeout: seconds without a sign of life
    after which JAX takes a process for lost, and ends the others.
    Raises ConfigError when the job cannot be as it is told, PeerLostError that names who has not come.
    """
    place = find_membership(
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        local_device_ids=local_device_ids,
        timeout=join_timeout,
    )
    if place.num_processes == 1:
        if place.local_device_ids is not None:
            visible = ",".join(map(str, place.local_device_ids))
            jax.config.update("jax_cuda_visible_devices", visible)
            jax.config.update("jax_rocm_visible_devices", visible)
        return place
    address, count = split_address(place.coordinator), place.num_processes
    if place.process_id == 0:
        roll_call.take(address, num_processes=count, timeout=join_timeout, say=logging.info)
    else:
        roll_call.answer(
            address, process_id=place.process_id, num_processes=count, timeout=join_timeout, say=logging.info
        )
        time.sleep(0.1)  # process 0 opens the port anew; who finds it closed tries again after a whole second
    _bypass_proxies(address[0])
    # Ours are `stop.py` and the line above.
    for setting in ("jax_enable_preemption_service", "jax_check_proxy_envs"):
        with contextlib.suppress(AttributeError):  # a JAX without it
            jax.config.update(setting, False)
    jax.distributed.initialize(
        place.coordinator,
        count,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",  # under Slurm it would leave this process one device
        initialization_timeout=_SECONDS_AFTER_ROLL_CALL,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    if (service := _service()) is not None:
        service.client.key_value_set(f"pgdist/hosts/{place.process_id}", socket.gethostname())
    logging.info(
        "Joined the job at %s as process %d of %d (%s).",
        place.coordinator,
        place.process_id,
        count,
        place.why,
    )
    return place


def leave() -> None:
    """Leaves the job together with all its processes; nothing for a job of one."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def meet(*, seconds: float) -> bool:
    """Whether all processes of the job come here within so many seconds of the first; once in a job."""
    if _service() is None:  # no barrier gives up then
        return False
    try:
        barrier("meet", seconds=seconds)
    except PeerLostError:
        return False
    return True


def barrier(name: str, *, seconds: float = 600.0) -> None:
    """Waits until every process is here.

    Raises PeerLostError that names those who do not come within `seconds` of the first.
    """
    if (service := _service()) is None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)
        return
    _barriers[name] += 1
    place = f"pgdist/barriers/{name}/{_barriers[name]}"
    try:
        service.client.key_value_set(f"{place}/{service.process_id}", "")
        service.client.wait_at_barrier(place, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        missing = _missing(service, place)
        if service.process_id == 0:
            time.sleep(
                1.0
            )  # JAX's service goes with it, which aborts the others: let them say first what happened
        raise PeerLostError(f"{name}: waited {seconds:g} s for {missing}.") from error


def hosts() -> list[str]:
    """The host of each process, as it calls itself; of this one alone where nobody knows of the others."""
    return _hosts(service) if (service := _service()) is not None else [socket.gethostname()]


def gather(name: str, text: str, *, seconds: float) -> list[str]:
    """The texts of all processes, in their order, for process 0; [] for the others. All must call this.

    name: of this exchange, once in a job.  Raises PeerLostError as `barrier`. Needs no device.
    """
    if (service := _service()) is None:
        return _all_texts(text)
    service.client.key_value_set(f"pgdist/texts/{name}/{service.process_id}", text)
    barrier(f"gather {name}", seconds=seconds)
    if service.process_id != 0:
        return []
    found = _numbered(service, f"pgdist/texts/{name}")
    return [found[number] for number in range(service.num_processes)]


def announce(name: str, text: str, *, seconds: float) -> str:
    """The text of process 0, for all. All must call this, the others with any text.

    name: of this exchange, once in a job.  Raises PeerLostError where process 0 says nothing for `seconds`.
    """
    if (service := _service()) is None:
        return _all_texts(text)[0]
    key = f"pgdist/announced/{name}"
    if service.process_id == 0:
        service.client.key_value_set(key, text)
        return text
    try:
        return service.client.blocking_key_value_get(key, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise PeerLostError(f"{name}: waited {seconds:g} s for a word from process 0.") from error


def is_primary() -> bool:
    """Whether this process writes what the job has only one of."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether the value is true in every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(value).all())


def any_process(value: bool) -> bool:
    """Whether the value is true in one process at least; all must call it."""
    return not all_agree(not value)


def all_equal(value: int) -> bool:
    """Whether the value is the same in every process; all must call it."""
    return jax.process_count() == 1 or len(set(multihost_utils.process_allgather(value).tolist())) == 1


def on_primary(action: Callable[[], None]) -> None:
    """Calls `action` in process 0 alone; all must call this, and go on when it is done.

    An error of it is raised there and one of the same exit code in the others: all end, and alike.
    """
    together(action if is_primary() else lambda: None)


def together(action: Callable[[], None]) -> None:
    """Calls `action`; where it fails in one process all fail, with one exit code. All must call this."""
    error = None
    try:
        action()
    except Exception as found:
        error = found
    code = 0 if error is None else getattr(error, "exit_code", 1)
    codes = [code] if jax.process_count() == 1 else multihost_utils.process_allgather(code).tolist()
    if error is not None:
        raise error
    if any(codes):
        found = UserError("Another process of this job cannot go on; its log says why.")
        found.exit_code = max(codes)
        raise found


def _bypass_proxies(host: str) -> None:
    """Takes JAX's coordinator from what this process reaches through a proxy: there it would never join."""
    used = [name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)]
    if used:
        # gRPC looks at these in lower case alone, and at no_proxy where there is no no_grpc_proxy.
        direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")
        os.environ["no_grpc_proxy"] = ",".join(filter(None, [direct, host]))
        logging.warning(
            "%s is set, and the coordinator %s is reached without it. Name the hosts of the job in no_proxy, or "
            "unset it, if processes that are there do not find each other.",
            " and ".join(used),
            host,
        )


def _service() -> Any | None:
    """JAX's coordination service in this process; None in a job of one.

    It alone has barriers that give up and texts that need no device, and no public name.
    """
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    needed = ("wait_at_barrier", "key_value_set", "key_value_dir_get", "blocking_key_value_get")
    client = getattr(global_state, "client", None)
    return global_state if client is not None and all(hasattr(client, name) for name in needed) else None


def _missing(service: Any, place: str) -> str:
    """Who has not come to a barrier, with their hosts."""
    try:
        present = _numbered(service, place)
        names = _hosts(service)
    except jax.errors.JaxRuntimeError:
        return "process 0, which has gone, or for others that are lost"
    missing = [number for number in range(service.num_processes) if number not in present]
    shown = sorted({names[number] for number in missing})[:8]
    return (
        f"{roll_call.name_processes(missing)} on {', '.join(shown)}"
        if missing
        else "processes that came late"
    )


def _hosts(service: Any) -> list[str]:
    found = _numbered(service, "pgdist/hosts")
    return [found.get(number, "an unknown host") for number in range(service.num_processes)]


def _numbered(service: Any, folder: str) -> dict[int, str]:
    """{process: text} of what they have put under `folder/PROCESS`."""
    entries = service.client.key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): text for key, text in entries}


def _all_texts(text: str) -> list[str]:
    """The texts of all processes, where there is no service: through their devices."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).tolist()
    rows = multihost_utils.process_allgather(np.pad(data, (0, max(sizes) - data.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
