"""Profiles: which steps a trace holds, that its files open, and that wrong requests are refused."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pgdist.errors import ConfigError, Preempted
from pgdist.finetune import finetune
from pgdist.report import load_run
from pgdist.train.profile import ProfiledSteps, Profiler, parse_profiled_steps
from tests.tiny_runs import losses, tiny_config, write_inputs
from tests.train.test_loop import Notes, loop, state_after


def annotated_steps(folder: Path) -> list[int]:
    """The numbers of the steps in the one trace of a folder, read as xprof and as Perfetto read them."""
    (xplane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    (perfetto,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    found = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(xplane)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    assert [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"] == found
    return found


def test_a_run_leaves_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    last_norm = (("llm/final_norm/.*", 1.0), (".*", 0.0))  # quickly compiled
    config = tiny_config(write_inputs(tmp_path / "inputs"), trainable=last_norm, steps=6)
    workdir = tmp_path / "run"

    finetune(config, workdir=workdir, devices=jax.devices()[:2], profile=ProfiledSteps(first=3, count=2))

    assert annotated_steps(workdir / "profile") == [3, 4]
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    metrics = load_run(workdir).metrics
    assert [step for step, _ in metrics.points("time/loading_seconds")] == [0]
    assert [step for step, _ in metrics.points("time/compile_seconds")] == [0]


def test_a_trace_begins_and_ends_with_nothing_on_the_device(tmp_path):
    profiler = Profiler(ProfiledSteps(first=3, count=2), tmp_path)
    events = []

    for number in range(1, 6):
        with profiler.step(number, drain=lambda: events.append("drain")):
            events.append(number)

    assert events == [1, 2, "drain", 3, 4, "drain", 5]
    assert annotated_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("asked_at", [1, 2, 3])
def test_a_process_that_profiles_stops_after_the_same_step_as_one_that_does_not(tmp_path, asked_at):
    profiler = Profiler(ProfiledSteps(first=3, count=1), tmp_path / "profile")
    for fields in ({}, {"profiler": profiler}):
        with pytest.raises(Preempted, match=f"after step {asked_at + 2} of"):
            loop(tmp_path, Notes(), should_stop=lambda step: step == asked_at, **fields).run(state_after(0))


def test_a_run_that_stops_in_the_middle_leaves_the_steps_that_it_made(tmp_path):
    profiler = Profiler(ProfiledSteps(first=3, count=6), tmp_path / "profile")

    with pytest.raises(Preempted, match="after step 5"):
        loop(tmp_path, Notes(), profiler=profiler, should_stop=lambda step: step == 3).run(state_after(0))
    profiler.close()

    assert annotated_steps(tmp_path / "profile") == [3, 4, 5]


@pytest.mark.parametrize(("start", "expected"), [(3, [4]), (4, [])])
def test_a_run_that_goes_on_profiles_what_is_left(tmp_path, start, expected):
    profiler = Profiler(ProfiledSteps(first=3, count=2), tmp_path / "profile")

    loop(tmp_path, Notes(), profiler=profiler).run(state_after(start))
    profiler.close()

    assert (tmp_path / "profile").exists() == bool(expected)
    assert not expected or annotated_steps(tmp_path / "profile") == expected


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pgdist.train.profile import ProfiledSteps, Profiler\n"
        "profiler = Profiler(ProfiledSteps(first=1, count=1), Path(sys.argv[1]))\n"
        "with profiler.step(1, drain=lambda: None):\n"
        "    pass\n"
        "print('going on')"
    )
    # In a process of its own: JAX takes no further trace in one where this has failed.
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "profile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "going on\n", done.stderr
    assert "The profile could not be written" in done.stderr and "is not a directory" in done.stderr


def test_step_and_count_are_two_numbers():
    assert parse_profiled_steps("10:3") == ProfiledSteps(first=10, count=3)


@pytest.mark.parametrize("text", ["", "abc", "3", "3:0", "0:2", "-1:2", "3:2:1", "3:", " 3:2", "1.5:2"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"expected STEP:COUNT.*such as 10:3"):
        parse_profiled_steps(text)


def test_a_run_must_have_the_steps():
    ProfiledSteps(first=19, count=2).check(20)
    with pytest.raises(ConfigError, match=r"--profile=20:2: .* found step 21 of 20 \(config.steps\)"):
        ProfiledSteps(first=20, count=2).check(20)
