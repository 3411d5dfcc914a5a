"""The loop's order, and how it ends: done, stopped, diverged, or with too many bad records.

What the loop touches is replaced by things that note when they are asked; the last tests take the real step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pgdist.data.bad_records import BadRecordLog, BadShare
from pgdist.data.jsonl import BadRecord
from pgdist.data.loader import HostBatch
from pgdist.errors import DataError, DivergedError, Preempted
from pgdist.finetune import finetune
from pgdist.mesh import make_mesh
from pgdist.stop import StopVoted
from pgdist.train.loop import Loop
from pgdist.train.profile import NoProfiler
from pgdist.train.state import TrainState
from tests.tiny_runs import assert_same_bits, host, losses, read_jsonl, tiny_config, write_inputs
from tests.train.small_training import batch_of_step, small_training

ROWS = 8


@dataclasses.dataclass(kw_only=True)
class Notes:
    """What happened, in order: ("fetch", step), ("step", step), ("look", updates), ("save", updates), ..."""

    events: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    written: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def note(self, what: str, step: int) -> None:
        self.events.append((what, step))

    def steps_of(self, what: str) -> list[int]:
        return [step for event, step in self.events if event == what]

    # As a metric writer: the loop writes the loss of a step when it has looked at it.
    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.written[step] = self.written.get(step, {}) | dict(metrics)
        if "train/loss" in metrics:
            self.note("look", step)

    def close(self) -> None:
        pass

    # As checkpoints.
    def save(self, step: int, state: TrainState) -> None:
        assert int(state.step) == step
        self.note("save", step)

    def wait(self) -> None:
        self.note("wait", self.steps_of("save")[-1])


def batches(notes: Notes, *, bad: Callable[[int], int] = lambda step: 0) -> Iterator[HostBatch]:
    """Batches of 8 rows without content; bad(step) -> how many of them are masked."""
    for step in itertools.count():
        notes.note("fetch", step)
        weight = np.arange(ROWS) >= bad(step)
        truncated = np.arange(ROWS) < step % ROWS
        yield HostBatch(
            arrays={
                "weight": weight.astype(np.float32),
                "truncated": truncated.astype(np.float32),
                "index": np.arange(ROWS),
            },
            records=(),
            bad=tuple(BadRecord(file="a.jsonl", line=n + 1, reason="none") for n in range(bad(step))),
            step=step,
        )


def loop(
    tmp_path: Path,
    notes: Notes,
    *,
    is_finite: Callable[[int], bool] = lambda step: True,
    bad: Callable[[int], int] = lambda step: 0,
    **fields: Any,
) -> Loop:
    """A loop of 10 steps that saves every 4 and evaluates every 5.  is_finite: of a step's loss."""

    def step(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict[str, np.ndarray]]:
        number = int(state.step)
        notes.note("step", number)
        finite = is_finite(number)
        metrics = {
            "loss": number if finite else np.nan,
            "grad_norm": 1.0,
            "relative_rate": 0.5,
            "examples": batch["weight"].sum(),
            "tokens": 10.0,
            "truncated": batch["truncated"].sum(),
            "finite": float(finite),
            "stop": batch["stop"].max(),
        }
        return state.replace(step=np.int32(number + 1)), metrics

    def evaluate(updates: int, state: TrainState) -> dict[str, float]:
        assert int(state.step) == updates
        notes.note("evaluate", updates)
        return {"validation/loss": 1.0}

    defaults: dict[str, Any] = {
        "step": step,
        "frozen": {},
        "mesh": make_mesh(devices=jax.devices()[:1]),
        "batches": batches(notes, bad=bad),
        "batch_size": ROWS,
        "total_steps": 10,
        "base_learning_rate": 0.02,
        "sequence_length": 30,
        "flops_per_example": 1e9,
        "writer": notes,
        "checkpoints": notes,
        "checkpoint_every": 4,
        "evaluate": evaluate,
        "evaluate_every": 5,
        "evaluate_first": False,
        "should_stop": lambda updates: False,
        "bad_records": BadRecordLog(tmp_path / "bad_records.jsonl"),
        "bad_share": BadShare(num_examples=100, max_share=0.1),
        "patience": 2,
        "profiler": NoProfiler(),
    }
    return Loop(**defaults | fields)


def state_after(updates: int) -> TrainState:
    return TrainState(step=np.int32(updates), trainable={}, opt_state=())


def test_a_save_comes_after_its_look_and_before_the_next_fetch(tmp_path):
    notes = Notes()

    end = loop(tmp_path, notes).run(state_after(0))

    assert int(end.step) == 10
    assert notes.steps_of("fetch") == notes.steps_of("step") == list(range(10))
    assert notes.steps_of("look") == list(range(1, 11))
    assert notes.steps_of("save") == [4, 8, 10]
    assert notes.steps_of("evaluate") == [5, 10]
    for updates in (4, 8):
        look, save, fetch = (
            notes.events.index(e) for e in (("look", updates), ("save", updates), ("fetch", updates))
        )
        assert look < save < fetch


def test_metrics_are_looked_at_when_the_next_step_is_on_its_way(tmp_path):
    notes = Notes()

    loop(tmp_path, notes, checkpoint_every=100, evaluate_every=0).run(state_after(0))

    for updates in range(1, 10):
        assert notes.events.index(("step", updates)) < notes.events.index(("look", updates))
        assert notes.events.index(("look", updates)) < notes.events.index(
            ("fetch", updates + 1) if updates < 9 else ("save", 10)
        )


def test_each_step_is_written_with_its_own_numbers(tmp_path):
    notes = Notes()

    loop(tmp_path, notes, bad=lambda step: int(step == 2)).run(state_after(0))

    for step in range(10):
        row = notes.written[step + 1]
        assert row["train/loss"] == step
        assert row["train/learning_rate"] == 0.01
        assert row["train/truncated_rows"] == step % ROWS
        assert row["train/masked_rows"] == int(step == 2)
        assert row["train/tokens_per_second"] == pytest.approx(30 * row["train/examples_per_second"])
        assert row["train/tokens_per_second_per_device"] == row["train/tokens_per_second"]  # there is one
        assert all(row[f"time/{name}_seconds"] >= 0 for name in ("step", "data_wait", "host_wait"))
        assert not {"train/mfu", "memory/peak_bytes"} & row.keys()  # a CPU tells neither
    assert notes.written[5]["validation/loss"] == 1.0 and "time/evaluation_seconds" in notes.written[5]
    assert "time/checkpoint_seconds" in notes.written[8]
    assert [step for step, row in notes.written.items() if "time/compile_seconds" in row] == [0]


def test_where_the_peak_is_known_utilisation_is_model_flops_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pgdist.train.loop.peak_flops", lambda device: 1e15)
    notes = Notes()

    loop(tmp_path, notes, flops_per_example=2e12).run(state_after(0))

    for row in list(notes.written.values())[1:]:
        assert row["train/mfu"] == pytest.approx(row["train/examples_per_second"] * 2e12 / 1e15)


def test_the_shares_of_a_steps_time_sum_to_the_time_that_its_rate_counts(tmp_path):
    notes = Notes()

    loop(tmp_path, notes).run(state_after(0))

    for step in range(1, 11):
        row = notes.written[step]
        seconds = sum(row[f"time/{name}_seconds"] for name in ("step", "data_wait", "host_wait"))
        assert row["train/examples_per_second"] == pytest.approx(ROWS / seconds)


def test_cut_texts_are_told_once(tmp_path, caplog):
    loop(tmp_path, Notes()).run(state_after(0))

    told = [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()]
    assert told == ["Step 2: 1 of 8 texts are longer than config.data.text_length and were cut."]


def test_a_loop_goes_on_from_the_step_of_its_state_and_a_finished_one_does_nothing(tmp_path):
    notes = Notes()
    loop(tmp_path, notes).run(state_after(7))
    assert notes.steps_of("step") == [7, 8, 9] and notes.steps_of("save") == [8, 10]

    finished = Notes()
    loop(tmp_path, finished).run(state_after(10))
    assert finished.events == []


@pytest.mark.parametrize("stop_at", [3, 4, 9])
def test_a_stop_saves_and_waits_and_says_so(tmp_path, stop_at):
    notes = Notes()

    with pytest.raises(Preempted, match=f"after step {stop_at} of 10.*start again") as stopped:
        loop(tmp_path, notes, should_stop=lambda updates: updates == stop_at - 2).run(state_after(0))

    assert stopped.value.exit_code == 42
    assert notes.events[-3:] == [("look", stop_at), ("save", stop_at), ("wait", stop_at)]
    assert notes.steps_of("fetch") == list(range(stop_at))


def test_a_stop_asked_for_while_loading_saves_before_the_first_update(tmp_path):
    notes = Notes()

    with pytest.raises(Preempted, match="after step 7 of 10"):
        loop(tmp_path, notes, should_stop=lambda updates: True, evaluate_first=True).run(state_after(7))

    assert notes.events == [("save", 7), ("wait", 7)]


def test_a_stop_in_an_evaluation_saves_the_state_that_was_evaluated(tmp_path):
    notes = Notes()

    def evaluate(updates: int, state: TrainState) -> dict[str, float]:
        raise StopVoted

    with pytest.raises(Preempted, match="after step 5 of 10"):
        loop(tmp_path, notes, evaluate=evaluate).run(state_after(0))

    assert notes.events[-2:] == [("save", 5), ("wait", 5)]


def test_should_stop_is_asked_before_each_update(tmp_path):
    asked: list[int] = []

    loop(tmp_path, Notes(), should_stop=lambda updates: asked.append(updates) or False).run(state_after(2))

    assert asked == [2, *range(2, 10)]  # once more before the first, for what came while loading


def test_losses_that_are_not_finite_beyond_patience_end_the_run_unsaved(tmp_path):
    notes = Notes()

    with pytest.raises(DivergedError, match="in 3 steps in a row, up to step 8") as diverged:
        loop(tmp_path, notes, is_finite=lambda step: step < 5).run(state_after(0))

    assert diverged.value.exit_code == 4
    assert "learning_rate" in str(diverged.value) and "clip_norm" in str(diverged.value)
    assert notes.steps_of("look")[-1] == 8
    assert notes.steps_of("save") == [4]  # the one of step 8 was due: its loss was looked at first


def test_no_patience_ends_at_the_first_one(tmp_path):
    with pytest.raises(DivergedError, match="up to step 6"):
        loop(tmp_path, Notes(), is_finite=lambda step: step != 5, patience=0).run(state_after(0))


def test_steps_within_patience_are_forgotten_when_one_is_finite(tmp_path):
    notes = Notes()

    end = loop(tmp_path, notes, is_finite=lambda step: step % 3 == 2).run(state_after(0))

    assert int(end.step) == 10
    assert np.isnan(notes.written[1]["train/loss"]) and notes.written[3]["train/loss"] == 2


def test_too_many_bad_records_end_the_run_and_are_listed(tmp_path):
    notes = Notes()

    with pytest.raises(DataError, match="max_bad_share") as found:
        loop(tmp_path, notes, bad=lambda step: 4, total_steps=10).run(state_after(0))

    assert found.value.exit_code == 3
    assert notes.steps_of("look")[-1] == 3  # 12 of 100 examples, when 10 are allowed
    assert notes.steps_of("save") == []
    assert [row["line"] for row in read_jsonl(tmp_path / "bad_records.jsonl")] == [1, 2, 3, 4]  # each once


def test_a_real_step_that_is_not_finite_changes_only_the_counter():
    training = small_training(
        make_mesh(data=2), optimizer="adamw", learning_rate=1e-3
    )  # compiled elsewhere, too
    state, _ = training.step(training.start(), {}, training.place(batch_of_step(0)))
    before = host(state.trainable), [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    poisoned = batch_of_step(1)
    poisoned["weight"][3] = np.nan

    state, metrics = training.step(state, {}, training.place(poisoned))

    assert float(metrics["finite"]) == 0.0 and np.isnan(float(metrics["loss"]))
    assert int(state.step) == 2
    assert_same_bits(host(state.trainable), before[0])
    for found, expected in zip(jax.tree.leaves(state.opt_state), before[1], strict=True):
        np.testing.assert_array_equal(found, expected)
    state, metrics = training.step(state, {}, training.place(batch_of_step(2)))
    assert float(metrics["finite"]) == 1.0
    assert any(
        np.any(a != b) for a, b in zip(host(state.trainable).values(), before[0].values(), strict=True)
    )


def test_a_run_that_diverges_leaves_only_finite_checkpoints(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    # The loss and its gradients are finite; so large a step would make infinities of the parameters.
    fields = {"optimizer.learning_rate": 3e38, "trainable": ((".*", 10.0),), "patience": 1}

    with pytest.raises(DivergedError, match="in 2 steps in a row"):
        finetune(tiny_config(inputs, **fields, **{"checkpoint.every": 1}), workdir=tmp_path / "run")

    assert np.isfinite(losses(tmp_path / "run")[1])
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "1"
    assert all(np.all(np.isfinite(array)) for array in stored(saved))


def stored(checkpoint: Path) -> list[np.ndarray]:
    """All arrays of a checkpoint, read by Orbax as they lie there."""
    from orbax.checkpoint import v1 as ocp

    return [np.asarray(leaf) for leaf in jax.tree.leaves(ocp.load(checkpoint))]
