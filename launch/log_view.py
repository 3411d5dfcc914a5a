"""Shows on the terminal what processes write into their logs, each line behind the number of its process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)  # ANSI foregrounds that are readable on dark and on light
_BLOCK = 2**16  # bytes

# What Gloo prints of each connection, a line of two processes mixed now and then; the log keeps it.
_NOISE = re.compile(r"\[Gloo\]|connected peer ranks|^[\s\d]+is connected to")


class LogView:
    """The lines that one log gets from byte `start` on."""

    def __init__(self, path: Path, *, start: int, prefix: str, colour: int | None) -> None:
        self._path = path
        self._position = start
        self._rest = b""
        self._prefix = f"\x1b[{colour}m{prefix}\x1b[0m" if colour else prefix

    def show(self, out: TextIO, *, to_the_end: bool = False) -> None:
        """Prints the whole lines that are new; with `to_the_end` what comes after the last line break, too."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._position)
                while block := log.read(_BLOCK):
                    self._position += len(block)
                    *lines, self._rest = (self._rest + block).split(b"\n")
                    for line in lines:
                        self._print(line, out)
        except FileNotFoundError:
            return
        if to_the_end and self._rest:
            self._print(self._rest, out)
            self._rest = b""

    def _print(self, line: bytes, out: TextIO) -> None:
        # What overwrites its line on a terminal, as progress bars do, is shown as it looks in the end.
        text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
        if not _NOISE.search(text):
            show(f"{self._prefix}{text}", out)


def show(text: str, out: TextIO) -> None:
    """Prints a line; where nobody reads any more (a closed terminal, a pipe whose reader has gone) nothing from then
    on: the job goes on, and the logs have it all.
    """
    try:
        print(text, file=out, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def view_logs(
    logs: dict[int, tuple[Path, int]], *, ranks: Collection[int] | None, out: TextIO = sys.stdout
) -> list[LogView]:
    """Views of {process: (log, first byte)}, of those in `ranks` or of all; a single process has no prefix."""
    width = len(str(max(logs, default=0)))
    return [
        LogView(
            path,
            start=start,
            prefix=f"[{number:>{width}}] " if len(logs) > 1 or number else "",
            colour=_COLOURS[number % len(_COLOURS)] if out.isatty() else None,
        )
        for number, (path, start) in logs.items()
        if ranks is None or number in ranks
    ]
