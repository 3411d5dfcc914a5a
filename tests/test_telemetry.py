"""What the metric writers leave behind: on disk, on a terminal, and where there is neither."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgdist import telemetry


def read_rows(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path: Path, steps, **kwargs) -> None:
    writer = telemetry.JsonlWriter(path, **kwargs)
    for step in steps:
        writer.write(step, {"train/loss": 1 / (step + 1)})
    writer.close()


def test_a_jsonl_line_holds_step_time_and_metrics_and_is_there_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = telemetry.JsonlWriter(path)
    writer.write(np.int64(3), {"train/loss": np.float32(1.25), "train/masked_rows": np.int32(2)})
    (row,) = read_rows(path)
    assert row.pop("time") > 1.6e9
    assert row == {"step": 3, "train/loss": 1.25, "train/masked_rows": 2}
    writer.close()


def test_jax_scalars_are_written_as_numbers(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    writer = telemetry.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"train/loss": jnp.float32(0.5), "train/grad_norm": jnp.bfloat16(2.0)})
    writer.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["train/loss"], row["train/grad_norm"]) == (0.5, 2.0)


def test_values_that_are_not_finite_are_valid_json_and_can_be_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = telemetry.JsonlWriter(path)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": np.float32(-np.inf)})
    writer.close()
    (row,) = read_rows(path)
    assert (row["a"], row["b"], row["c"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(row["a"])) and float(row["b"]) == math.inf and float(row["c"]) == -math.inf


def test_resuming_drops_the_later_steps_of_the_crashed_attempt(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(10))
    write_steps(path, range(5, 12), resume_step=4)
    assert [row["step"] for row in read_rows(path)] == list(range(12))
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_at_minus_one_starts_over_and_none_keeps_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 1])
    write_steps(path, [2])
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    write_steps(path, [0], resume_step=-1)
    assert [row["step"] for row in read_rows(path)] == [0]


@pytest.mark.parametrize("resume_step", [None, 7])
def test_a_line_torn_by_a_crash_is_removed_before_appending(tmp_path, resume_step):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo')
    write_steps(path, [3], resume_step=resume_step)
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_lines_without_a_step_do_not_survive_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\n[1]\n{"step": null}\n{}\n{"step": 2}\n')
    write_steps(path, [], resume_step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_crash_while_dropping_lines_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(4))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("crash")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="crash"):
        telemetry.JsonlWriter(path, resume_step=1)
    assert path.read_bytes() == before


def test_tensorboard_files_hold_the_scalars_and_the_restart(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    writer = telemetry.TensorBoardWriter(tmp_path, resume_step=4)
    writer.write(5, {"train/loss": np.float32(0.5)})
    writer.write(6, {"train/loss": math.nan})
    writer.close()
    (path,) = tmp_path.iterdir()
    content, offset, events = path.read_bytes(), 0, []
    while offset < len(content):  # TFRecord: length, its CRC, the bytes, their CRC
        length = int.from_bytes(content[offset : offset + 8], "little")
        events.append(event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length]))
        offset += length + 16
    values = [
        (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
    ]
    assert values[0] == (5, "train/loss", 0.5)
    assert values[1][:2] == (6, "train/loss") and math.isnan(values[1][2])
    assert [event.step for event in events if event.HasField("session_log")] == [5]


class Recorder:
    """A writer of a user's own."""

    def __init__(self, *, fails: bool = False):
        self.rows: list[tuple] = []
        self.closed = False
        self._fails = fails

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        if self._fails:
            raise RuntimeError("cannot close")
        self.closed = True


def test_many_writers_all_get_everything_and_all_are_closed():
    first, last = Recorder(fails=True), Recorder()
    writer = telemetry.MultiWriter([first, telemetry.NullWriter(), last])
    writer.write(1, {"a": 1.0})
    with pytest.raises(RuntimeError, match="cannot close"):
        writer.close()
    assert first.rows == last.rows == [(1, {"a": 1.0})]
    assert last.closed


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_now_and_then():
    stream, clock = io.StringIO(), Clock()
    bar = telemetry.ProgressBar(20, 0, stream=stream, line_interval=5.0, clock=clock)
    for step in range(1, 21):
        clock.now += 1.0
        metrics = {
            "train/loss": 2.0 / step,
            "train/examples_per_second": 8.0,
            "train/tokens_per_second": 1234.5,
        }
        bar.write(step, metrics)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/20  loss 2.0000  8.0 examples/s  1,234 tokens/s  ETA -:--:--"
    assert lines[1] == "step 6/20  loss 0.3333  8.0 examples/s  1,234 tokens/s  ETA 0:00:14"
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_what_is_written_before_the_first_step_gives_no_line_and_utilisation_is_shown_where_it_is_known():
    stream, clock = io.StringIO(), Clock()
    bar = telemetry.ProgressBar(3, 0, stream=stream, line_interval=0.0, clock=clock)
    bar.write(0, {"time/loading_seconds": 100.0})
    clock.now += 100.0  # compiling is no measure of the steps to come
    for step in (1, 2):
        clock.now += 2.0
        bar.write(step, {"train/loss": 1.0, "train/mfu": 0.6125})
    assert stream.getvalue().splitlines() == [
        "step 1/3  loss 1.0000  MFU 61.3%  ETA -:--:--",
        "step 2/3  loss 1.0000  MFU 61.3%  ETA 0:00:02",
    ]


def test_evaluations_and_the_last_step_of_a_run_cut_short_are_said():
    stream, clock = io.StringIO(), Clock()
    bar = telemetry.ProgressBar(20, 10, stream=stream, clock=clock)
    bar.write(11, {"train/loss": 1.0})
    bar.write(12, {"train/loss": math.nan})
    bar.write(12, {"validation/loss": 0.5, "validation/exact_match": 0.25})
    bar.close()
    assert stream.getvalue().splitlines()[1:] == [
        "step 12: validation loss 0.5000, exact_match 0.2500",
        "step 12/20  loss nan  ETA 0:00:00",
    ]


def test_forced_colours_do_not_put_a_bar_into_a_log_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    bar = telemetry.ProgressBar(2, 0, stream=stream)
    bar.write(2, {"train/loss": 1.0})
    bar.close()
    assert "\x1b" not in stream.getvalue()


class BrokenPipe(io.StringIO):
    def __init__(self, *, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stream_that_breaks_or_is_closed_stops_nothing(terminal):
    closed = io.StringIO()
    closed.close()
    for stream in (BrokenPipe(terminal=terminal), closed):
        bar = telemetry.ProgressBar(3, 0, stream=stream)
        for step in (1, 2, 3):
            bar.write(step, {"train/loss": 1.0, "validation/loss": 1.0})
        bar.close()


def test_a_process_started_without_stderr_goes_on():
    program = (
        "import os; os.close(2)\n"
        "from pgdist.telemetry import ProgressBar\n"
        "bar = ProgressBar(2, 0); bar.write(1, {'train/loss': 1.0}); bar.close(); print('done')"
    )
    for command in (program, "import sys; sys.stderr = None\n" + program):
        result = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stdout) == (0, "done\n")


def test_on_a_terminal_there_is_a_bar_and_log_messages_stand_above_it():
    program = (
        "from absl import logging\n"
        "from pgdist.telemetry import ProgressBar\n"
        "import time\n"
        "bar = ProgressBar(4, 0)\n"
        "for step in (1, 2, 3, 4):\n"
        "    bar.write(step, {'train/loss': 1 / step, 'train/examples_per_second': 9.0})\n"
        "    logging.warning('message %d', step)\n"
        "    time.sleep(0.11)\n"
        "bar.write(4, {'validation/loss': 0.5})\n"
        "bar.close()\n"
        "logging.warning('after')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", program], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux: the other end has been closed
                break
            shown += chunk
            if not chunk:
                break
    os.close(ours)
    assert process.returncode == 0, shown
    text = shown.decode()
    assert "loss 0.2500" in text and "9.0 examples/s" in text and "4/4" in text
    assert text.count("message 3") == 1 and "validation loss 0.5000" in text
    # A message that overwrote the bar would follow its last column without a new line.
    assert "examples/s  ETA 0:00:00W" not in text
    assert text.rstrip().endswith("after")
    # The cursor is never left hidden for longer than the moment in which the bar starts.
    assert text.index("\x1b[?25h") - text.index("\x1b[?25l") < 1000
