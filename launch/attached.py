"""Stays with a job that runs elsewhere: shows what it prints, and passes on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable


def watch(
    *,
    is_running: Callable[[], bool],
    show: Callable[[], None],
    stop: Callable[[], None],
    kill: Callable[[], None],
    interval: float = 1.0,
) -> None:
    """Returns when the job is not running any more, and all it has printed is shown.

    show: prints what is new.  The first SIGINT or SIGTERM calls `stop`, which asks the job to save and end; a
    second one `kill`, which ends it at once.
    """
    received: list[int] = []
    wake = threading.Event()

    def receive(number: int, frame: object) -> None:
        received.append(number)
        wake.set()

    old = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    told = 0
    try:
        while is_running():
            show()
            wake.wait(interval)
            wake.clear()
            if len(received) > told:
                told += 1
                if told == 1:
                    print("pgdist: asked the job to save and end; once more ends it at once", file=sys.stderr)
                    stop()
                else:
                    print("pgdist: ending the job", file=sys.stderr)
                    kill()
        show()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
