"""What asks an agent to stop: signals, and the lines of a launcher at the other end of its standard input."""

from __future__ import annotations

import signal
import sys
import threading
import time

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Seconds in which further signals are the same request, come by another way: a terminal that is closed sends two,
# and so do systemd and some schedulers.
_SAME_REQUEST = 0.25


class StopRequests:
    """The requests so far: the first asks to save and end, the second to end at once."""

    def __init__(self, *, from_stdin: bool) -> None:
        """from_stdin: whether the lines `stop` and `kill` count too, and the end of the input is noted."""
        self.total = 0
        self.launcher_is_gone = False
        self._new = 0
        self._last_signal = -_SAME_REQUEST
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda number, frame: self._receive())
        if from_stdin:
            threading.Thread(target=self._read, daemon=True, name="launcher").start()

    def take(self) -> int:
        """Those since the last call."""
        new, self._new = self._new, 0
        return new

    def _receive(self) -> None:
        now = time.monotonic()
        if now - self._last_signal >= _SAME_REQUEST:
            self._last_signal = now
            self._add(1)

    def _add(self, count: int) -> None:
        self._new += count
        self.total += count

    def _read(self) -> None:
        for line in sys.stdin:
            if line.strip() in ("stop", "kill"):
                self._add(1 if line.strip() == "stop" else 2)
        self.launcher_is_gone = True
        self.total += 1
