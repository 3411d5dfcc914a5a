"""A run that is interrupted and goes on ends where the undisturbed one ends, on the same mesh to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import pgdist.finetune
import pgdist.job
from pgdist.errors import Preempted
from tests.tiny_runs import (
    Inputs,
    assert_same_bits,
    host,
    largest_difference,
    losses,
    read_jsonl,
    tiny_config,
    write_inputs,
)

STEPS, STOP = 20, 13


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """params: None where the run was stopped.  ids: {step: example ids of the batch that was fetched}."""

    workdir: Path
    params: dict[str, np.ndarray] | None
    ids: dict[int, list[int]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs):
    """run(workdir, data=, devices=, stop_at=) -> Run of 20 steps."""

    def run(workdir: Path, *, data: int, devices=None, stop_at: int | None = None) -> Run:
        ids: dict[int, list[int]] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pgdist.job, "train_batches", noting_ids(pgdist.job.train_batches, ids))
            try:
                params = host(
                    pgdist.finetune.finetune(
                        tiny_config(inputs, **{"mesh.data": data}),
                        workdir=workdir,
                        should_stop=lambda step: stop_at is not None and step == stop_at - 2,
                        devices=devices,
                    ).params
                )
            except Preempted as stopped:
                assert stop_at and f"after step {stop_at} of {STEPS}" in str(stopped)
                params = None
        return Run(workdir=workdir, params=params, ids=ids)

    return run


def noting_ids(train_batches: Callable, ids: dict[int, list[int]]) -> Callable:
    """train_batches, whose batches note their example ids when they are fetched by the loop."""

    def open_batches(**arguments):
        batches = train_batches(**arguments)
        fetch = type(batches).__next__

        class Noting(type(batches)):
            def __next__(self):
                batch = fetch(self)
                ids[batch.step] = batch.arrays["index"].tolist()
                return batch

        batches.__class__ = Noting
        return batches

    return open_batches


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("undisturbed"), data=2)


@pytest.fixture(scope="module")
def interrupted(run, tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("interrupted"), data=2, stop_at=STOP)


@pytest.fixture
def resumed(run, interrupted, tmp_path):
    """resumed(data=, devices=) -> the Run that goes on in a copy of the interrupted one's workdir."""

    def resume(**arguments) -> Run:
        workdir = tmp_path / "resumed"
        shutil.copytree(interrupted.workdir, workdir)
        return run(workdir, **arguments)

    return resume


def test_a_stopped_run_saves_what_it_has_done_and_nothing_else(interrupted, undisturbed):
    assert interrupted.params is None
    saved = [path.name for path in (interrupted.workdir / "checkpoints").iterdir()]
    assert saved == [str(STOP)]
    assert losses(interrupted.workdir) == {s: losses(undisturbed.workdir)[s] for s in range(1, STOP + 1)}


def test_on_the_same_mesh_the_resumed_run_ends_bitwise_like_the_undisturbed(
    resumed, undisturbed, interrupted
):
    found = resumed(data=2)

    assert_same_bits(found.params, undisturbed.params)
    assert losses(found.workdir) == losses(undisturbed.workdir)
    assert_each_step_stands_once(found.workdir)
    assert_goes_on_with_the_next_examples(found, interrupted, undisturbed)


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({"data": 8}, id="8x1"), pytest.param({"data": 1, "devices": 1}, id="one device")],
)
def test_on_another_mesh_the_resumed_run_ends_like_the_undisturbed(
    resumed, undisturbed, interrupted, arguments
):
    devices = arguments.get("devices")
    found = resumed(data=arguments["data"], devices=jax.devices()[:devices] if devices else None)

    assert largest_difference(found.params, undisturbed.params) <= 1e-5
    assert losses(found.workdir) == pytest.approx(losses(undisturbed.workdir), rel=0, abs=1e-5)
    assert_each_step_stands_once(found.workdir)
    assert_goes_on_with_the_next_examples(found, interrupted, undisturbed)


def assert_each_step_stands_once(workdir: Path) -> None:
    steps = [row["step"] for row in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


def assert_goes_on_with_the_next_examples(found: Run, interrupted: Run, undisturbed: Run) -> None:
    """A resumed run also reads the first batch once more, to show it in its report."""
    later = {step: ids for step, ids in found.ids.items() if step > 0}
    assert list(later) == list(range(STOP, STEPS))
    assert list(interrupted.ids) == list(range(STOP))
    assert interrupted.ids | later == undisturbed.ids


def test_each_epoch_has_every_example_once(undisturbed):
    drawn = [example for step in range(STEPS) for example in undisturbed.ids[step]]

    epoch = 24
    for start in range(0, STEPS * 8 - epoch + 1, epoch):
        assert sorted(drawn[start : start + epoch]) == list(range(epoch))
    assert drawn[:epoch] != drawn[epoch : 2 * epoch]
