"""The wish to stop: a signal says so to one process, and all stop after the same step with the state saved.

Each process notes its own signals; whether all stop is decided by what they all compute together: a flag that
travels with the batch (`pgdist.train.loop`), or `cluster.any_process` between steps. So nothing depends on
which process was told, on how many there are, or on JAX's preemption service, which a handler of ours would
silence and which one process alone does not have.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds in which a further signal is the same request: `timeout` signals a process, and then its group.
_SAME_REQUEST = 0.25


class StopVoted(Exception):
    """The processes of the job have agreed to stop; whoever holds the state saves it."""


class StopRequest:
    """Notes SIGTERM and SIGINT; a context manager that puts the old handlers back.

    A second signal ends the process at once, with 128 + its number; under an agent, which sends signals on and
    counts them itself, further ones mean nothing. Does nothing outside the main thread, where no signals come.
    """

    def __init__(self, *, second_ends: bool = True) -> None:
        self._second_ends = second_ends
        self._is_wanted = False
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Python runs handlers between two of its own instructions, and a compilation is none of them for
            # minutes. What is written here by C code is read by a thread at once.
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            self._old_handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._listen()
            threading.Thread(target=self._receive, daemon=True, name="stop-request").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old_handlers:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._old_wakeup)
            os.close(self._write_end)  # the thread reads the end, and leaves

    def is_wanted(self, step: int = 0) -> bool:
        """Whether this process was asked to stop; another one may not have been."""
        del step
        if self._old_handlers:
            self._listen()  # libraries that load later install theirs in our place (libtpu does)
        return self._is_wanted

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def _receive(self) -> None:
        first = 0.0
        while received := os.read(self._read_end, 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if not self._is_wanted:
                self._is_wanted = True
                first = time.monotonic()
                _tell("saving at the next step, then ending")
                if self._second_ends:
                    _tell("a second signal ends at once, unsaved")
            elif self._second_ends and time.monotonic() - first > _SAME_REQUEST:
                _tell("ended at once; what was saved before is whole")
                os._exit(128 + number)
        os.close(self._read_end)


def _tell(text: str) -> None:
    """Not through a stream: the main thread may be in the middle of a write to it."""
    with contextlib.suppress(OSError):  # nobody reads any more
        os.write(2, f"\npgdist: {text}\n".encode())
