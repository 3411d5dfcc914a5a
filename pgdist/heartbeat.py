"""Signs of life: what a process does, how far it is, and when it last got further.

Written to the file that the environment names (the agent of the host puts it there and reads it); without one
nothing is written. The thread that trains writes it where it makes progress, so that a process which hangs in a
collective falls silent although it lives. Needs no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Literal

VARIABLE = "PGDIST_HEARTBEAT"

Phase = Literal["starting", "loading", "compiling", "stepping", "saving", "evaluating", "finishing"]

_BYTES = 128  # of the file, always: a reader never sees the end of an older and longer beat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """step: updates made; -1 before anyone knows.  time: of the process's clock, seconds since the epoch."""

    phase: Phase
    step: int
    time: float


_last_step = -1


def beat(phase: Phase, *, step: int | None = None) -> None:
    """Says that the process is alive and in `phase`.  step: updates made; by default as said before."""
    global _last_step
    _last_step = _last_step if step is None else step
    path = os.environ.get(VARIABLE)
    if not path:
        return
    text = json.dumps({"phase": phase, "step": _last_step, "time": time.time()})
    try:
        os.makedirs(
            os.path.dirname(path), exist_ok=True
        )  # temporary folders are tidied up, sometimes too soon
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, text.ljust(_BYTES).encode(), 0)
        finally:
            os.close(descriptor)
    except OSError:
        pass  # no reason to end a run


def read_beat(path: Path) -> Beat | None:
    """The last beat; None before the first, and where it is just being written."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
