"""Joining and leaving a job of one or several processes, and hearing that it is to stop.

One process needs none of JAX's distributed service; several need `join` before anything touches a device.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

from pgdist.errors import ConfigError, UserError


def join(*, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the job at coordinator "host:port" as process `process_id` of `num_processes`; nothing when all
    are None.

    Raises ConfigError when only some are given or they cannot be true.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ConfigError(
            f"--{' and --'.join(missing)} missing: a job of several processes needs --coordinator=HOST:PORT, "
            "--num_processes=N and, different in each process, --process_id=0..N-1."
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: expected HOST:PORT, such as 10.0.0.1:8476, found {coordinator!r}.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id: expected 0 to {num_processes - 1} (--num_processes={num_processes}), found "
            f"{process_id}."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)
    logging.info("Joined the job at %s as process %d of %d.", coordinator, process_id, num_processes)


def leave() -> None:
    """Leaves the job together with all its processes; nothing for a job of one."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def meet(*, seconds: float) -> bool:
    """Whether all processes of the job come here within so many seconds of the first; once in a job."""
    try:
        # The only barrier of JAX that gives up without ending the process has no public name.
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier("pgdist/meet", round(1000 * seconds))
    except (ImportError, AttributeError, jax.errors.JaxRuntimeError):
        return False
    return True


def is_primary() -> bool:
    """Whether this process writes what the job has only one of."""
    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether the value is true in every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(value).all())


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


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class StopRequest:
    """SIGTERM or SIGINT asks the job to save and stop; a context manager that puts the old handlers back.

    A job of several processes relies on JAX's preemption service instead, which makes all of them stop at
    the same step: a handler of our own would silence it.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.distributed.is_initialized():
            # JAX listens to SIGTERM alone.
            forward = lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)
            self._old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, forward)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def is_requested(self, step: int) -> bool:
        """Whether to stop after `step` updates; the same in every process, and all ask at every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = signal.Signals(number)
        # Not through a stream: the signal may have come in the middle of a write to it.
        os.write(2, b"\npgdist: finishing this step, then saving; a second signal ends at once, unsaved\n")
        # A second signal must end a job that cannot reach its next step.
        signal.signal(number, signal.SIG_DFL)
