"""The training step is compiled beside the loading of weights, and says whether it came from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pgdist.finetune
import pgdist.job
from pgdist.errors import ConfigError
from pgdist.train.compilation import BackgroundStep, compile_program
from tests.tiny_runs import ROOT, losses, tiny_config, write_config, write_inputs

FLOATS = jax.ShapeDtypeStruct((4,), jnp.float32)


@pytest.fixture
def keeps_all():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_a_program_is_compiled_once_and_then_read_from_the_cache(keeps_all):
    number = uuid.uuid4().int % 2**20  # which no run before has compiled

    def compile_again():
        jax.clear_caches()
        return compile_program(jax.jit(lambda x: x * number).lower(FLOATS), saves_memory="more devices")

    first, second = compile_again(), compile_again()
    assert (first.cache, first.is_kept) == ("miss", True)
    assert (second.cache, second.is_kept) == ("hit", False)
    assert second.program(jnp.ones(4)).tolist() == [number] * 4


def test_a_step_that_is_compiled_in_the_background_gives_what_jit_gives():
    step = jax.jit(lambda state, frozen, batch: (state + frozen * batch, {"loss": jnp.sum(batch)}))
    found = BackgroundStep(step, FLOATS, FLOATS, FLOATS, saves_memory="more devices")
    arrays = [jnp.arange(4.0) + i for i in range(3)]
    expected = step(*arrays)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found(*arrays), expected))


def test_a_step_that_needs_more_memory_than_there_is_says_what_helps():
    step = jax.jit(lambda state, frozen, batch: (jnp.zeros(2**46) + state[0], {}))
    found = BackgroundStep(step, FLOATS, FLOATS, FLOATS, saves_memory="more devices")
    with pytest.raises(ConfigError, match=r"does not fit.*What helps: more devices"):
        found(jnp.ones(4), jnp.ones(4), jnp.ones(4))


def test_weights_and_checkpoints_are_read_while_the_step_is_being_compiled(tmp_path, monkeypatch):
    """Reading begins only when the step is there: where nothing compiles meanwhile, for ever."""
    started = []

    class Noted(BackgroundStep):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            started.append(self)

    monkeypatch.setattr(pgdist.job, "BackgroundStep", Noted)
    load = pgdist.job.weights.load

    def load_when_compiled(*arguments, **more):
        started[-1].wait()
        return load(*arguments, **more)

    monkeypatch.setattr(pgdist.job.weights, "load", load_when_compiled)
    inputs = write_inputs(tmp_path)
    for steps in (2, 4):  # the second goes on from a checkpoint
        config = tiny_config(inputs, **{"steps": steps, "schedule.name": "constant"})
        pgdist.finetune.finetune(config, workdir=tmp_path / "run", fork=True)
    assert len(started) == 2 and sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_second_start_reads_the_step_that_the_first_one_has_compiled(tmp_path):
    config = write_config(tmp_path / "config.py", tiny_config(write_inputs(tmp_path), steps=2))
    first, second = start(config, tmp_path / "first"), start(config, tmp_path / "second")
    folder = tmp_path / "cache" / "programs"
    assert "Compiled the training step in" in first and f"the next start reads it from {folder}" in first
    assert "Read the training step from the cache in" in second and str(folder) in second
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def start(config: Path, workdir: Path) -> str:
    chosen_by_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in chosen_by_tests}
    environment |= {"PGDIST_CACHE": str(workdir.parent / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            f"--config={config}",
            f"--workdir={workdir}",
            "--fake_devices=2",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
