"""What is said while weights are read."""

import os
import pty
import sys

import pytest

from pgdist.weights import reading_progress
from pgdist.weights.reading_progress import ReadingProgress

MB = 10**6


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(reading_progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(reading_progress.logging, "info", lambda text, *values: said.append(text % values))
    return said


def test_bytes_rate_and_time_left_are_said_now_and_then(clock, lines):
    with ReadingProgress("a.npz", 5850 * MB) as progress:
        for second in range(1, 27):
            clock[0] = second
            progress.advance(225 * MB)
    assert lines == [
        "Reading weights: 2.25 GB of 5.85 GB, 225 MB/s, 0:16 left.",
        "Reading weights: 4.50 GB of 5.85 GB, 225 MB/s, 0:06 left.",
        "Read 5.85 GB of a.npz in 26.0 s (225 MB/s).",
    ]


def test_small_files_and_failures_say_nothing(clock, lines):
    with ReadingProgress("tiny.npz", MB) as progress:
        progress.advance(MB)
    with pytest.raises(ValueError), ReadingProgress("a.npz", 5850 * MB) as progress:
        progress.advance(MB)
        raise ValueError
    assert lines == []


def test_a_terminal_gets_a_bar(monkeypatch, lines):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with ReadingProgress("a.npz", 5850 * MB) as progress:
            progress.advance(2925 * MB)
            progress._bar.refresh()
            shown = ""
            while "2.9/5.8" not in shown:  # or the test's time is up
                shown += os.read(reader, 100_000).decode()
    os.close(reader)
    assert "reading weights" in shown and "GB" in shown
