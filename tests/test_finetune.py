"""The job from a config to a trained model: what it writes, what it leaves alone, and starting it again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from pgdist import weights
from pgdist.config import model_config
from pgdist.data.jsonl import JsonlSource
from pgdist.data.loader import evaluation_batches
from pgdist.decode import Decoder, Sampling, generate
from pgdist.errors import ConfigError, DataError, Preempted, WeightsError
from pgdist.finetune import Finetuned, finetune
from pgdist.mesh import make_mesh
from pgdist.models.paligemma import parameter_shapes
from pgdist.parameters import flatten, unflatten
from tests.tiny_runs import (
    Inputs,
    assert_same_bits,
    host,
    losses,
    read_jsonl,
    tiny_config,
    write_inputs,
    write_weights,
)

STEPS, EVERY = 6, 4
TRAINED = "llm/layers/attn/"
FIELDS = {
    "mesh.data": 2,
    "steps": STEPS,
    "trainable": ((TRAINED + ".*", 1.0), (".*", 0.0)),
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "checkpoint.every": EVERY,
    "eval.every": EVERY,
    "eval.examples": 2,
    "data.max_bad_share": 0.1,
    "export": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    workdir: Path
    done: Finetuned


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """24 good training examples and one whose image is missing; 4 of validation."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    with open(inputs.train, "a") as file:
        file.write(
            json.dumps({"image": "images/lost.png", "prefix": "caption en", "suffix": "a circle"}) + "\n"
        )
    return inputs


@pytest.fixture(scope="module")
def config(inputs) -> ConfigDict:
    return tiny_config(inputs, **FIELDS, **{"data.validation": str(inputs.validation)})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Run:
    """A run from beginning to end; its folder is only looked at."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    return Run(workdir=workdir, done=finetune(config, workdir=workdir))


@pytest.fixture
def workdir(run, tmp_path) -> Path:
    """A copy of the finished run's folder, to go on in."""
    shutil.copytree(run.workdir, tmp_path / "work")
    return tmp_path / "work"


def metric(workdir: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_jsonl(workdir / "metrics.jsonl") if name in row}


def test_a_run_writes_every_file_of_a_workdir(run):
    files = {path.name for path in run.workdir.iterdir()}

    assert files == {
        *("config.json", "data.json", "env.json", "parameters.json"),
        *("metrics.jsonl", "tb", "examples.jsonl", "predictions", "report.html"),
        *("checkpoints", "model.npz", "bad_records.jsonl"),
    }
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} == {str(EVERY), str(STEPS)}
    assert list((run.workdir / "tb").iterdir())
    html = (run.workdir / "report.html").read_text()
    assert "</html>" in html and "caption en" in html
    for name in ("config.json", "env.json"):
        assert json.loads((run.workdir / name).read_text())


def test_metrics_tell_of_each_step_and_evaluation(run):
    assert list(losses(run.workdir)) == list(range(1, STEPS + 1))
    assert list(metric(run.workdir, "validation/loss")) == [0, EVERY, STEPS]
    assert list(metric(run.workdir, "validation/token_accuracy")) == [0, EVERY, STEPS]
    # Answers are scored where all examples are decoded; an evaluation on the way repeats no older score.
    assert list(metric(run.workdir, "validation/exact_match")) == [0, STEPS]
    assert run.done.metrics == {
        name: metric(run.workdir, name)[STEPS]
        for name in ("validation/loss", "validation/token_accuracy", "validation/exact_match")
    }


def test_predictions_stand_beside_their_examples(run, inputs):
    truth = read_jsonl(inputs.validation)

    for step, count in ((0, 4), (EVERY, 2), (STEPS, 4)):
        rows = read_jsonl(run.workdir / "predictions" / f"step_{step:06d}.jsonl")
        assert [row["index"] for row in rows] == list(range(count))
        for row, record in zip(rows, truth, strict=False):
            assert (row["prefix"], row["suffix"]) == (record["prefix"], record["suffix"])
            assert (row["image"], row["task"]) == (record["image"], record["task"])
            assert row["score"]["exact_match"] == float(row["prediction"] == row["suffix"])


def test_evaluation_answers_as_its_sampler_says(run, workdir, config, inputs):
    other = config.copy_and_resolve_references()
    other.eval.sampler, other.eval.candidates = "beam", 3

    finetune(other, workdir=workdir, fork=True)  # all steps are done: it evaluates

    greedy, beams = (
        [row["prediction"] for row in read_jsonl(folder / "predictions" / f"step_{STEPS:06d}.jsonl")]
        for folder in (run.workdir, workdir)
    )
    decoder = Decoder(
        model=run.done.model,
        mesh=make_mesh(data=2),
        batch_size=config.batch_size,
        max_new_tokens=config.eval.max_new_tokens,
        eos_id=run.done.tokenizer.eos_id,
        sampling=Sampling(method="beam", candidates=3),
    )
    questions = evaluation_batches(
        source=JsonlSource(inputs.validation),
        tokenizer=run.done.tokenizer,
        image_size=run.done.model.config.image.image_size,
        text_length=config.data.text_length,
        batch_size=config.batch_size,
        rows=range(config.batch_size),
        prompt_only=True,
    )
    with questions:
        expected = list(decoder.decode_batches(run.done.params, questions))
    assert beams == [run.done.tokenizer.decode(one.answers[0].tokens) for one in expected]
    assert beams != greedy


def test_examples_and_parameters_are_described(run):
    examples = read_jsonl(run.workdir / "examples.jsonl")
    assert len(examples) == 8 and {"image", "prefix", "suffix", "pieces", "mask_loss"} <= examples[0].keys()

    table = json.loads((run.workdir / "parameters.json").read_text())
    assert {row["name"] for row in table} == flatten(run.done.params).keys()
    for row in table:
        assert row["trainable"] == row["name"].startswith(TRAINED)
        assert row["dtype"] == ("float32" if row["trainable"] else "bfloat16")
        assert row["bytes"] == np.prod(row["shape"]) * (4 if row["trainable"] else 2)
    (embedding,) = [row for row in table if row["name"].endswith("input_embedding")]
    assert embedding["sharding"] == "fsdp on axis 0"


def test_a_bad_record_is_listed_and_masked_and_the_run_goes_on(run):
    (bad,) = read_jsonl(run.workdir / "bad_records.jsonl")

    assert bad["line"] == 25 and "lost.png" in bad["reason"]
    # 48 rows are drawn from 25 examples: each of them once, and all but two of them twice.
    assert sum(metric(run.workdir, "train/masked_rows").values()) in (1, 2)


def test_the_exported_model_has_the_published_layout(run, config):
    expected = {name: leaf.shape for name, leaf in flatten(parameter_shapes(model_config(config))).items()}

    with np.load(run.workdir / "model.npz", allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}

    assert {name: array.shape for name, array in stored.items()} == expected
    params = host(run.done.params)
    for name, array in stored.items():
        if name.startswith(TRAINED):
            assert array.dtype == np.float32
        else:
            assert array.dtype == np.dtype("V2")  # bfloat16, as published files have it
            array = array.view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, params[name])


def test_the_exported_model_answers_as_the_trained_one(run, inputs):
    expected = flatten(run.done.params)
    loaded = weights.load(run.workdir / "model.npz", expected=expected)
    rows = read_jsonl(run.workdir / "predictions" / f"step_{STEPS:06d}.jsonl")
    ask = {
        "images": [inputs.validation.parent / row["image"] for row in rows],
        "prompts": [row["prefix"] for row in rows],
        "tokenizer": run.done.tokenizer,
        "max_new_tokens": 4,
    }

    answers = generate(run.done.model, unflatten(loaded), **ask)

    assert answers == generate(run.done.model, run.done.params, **ask)
    assert answers == [row["prediction"] for row in rows]


def test_frozen_parameters_are_those_of_the_file_and_trained_ones_move(run, inputs):
    with np.load(inputs.weights) as file:
        before = {name: file[name] for name in file.files}

    after = host(run.done.params)
    frozen = {name for name in after if not name.startswith(TRAINED)}
    assert frozen and len(frozen) < len(after)
    assert_same_bits(
        {name: after[name] for name in frozen},
        {name: before[name].astype(ml_dtypes.bfloat16) for name in frozen},
    )
    for name in after.keys() - frozen:
        assert after[name].dtype == np.float32
        assert np.any(after[name] != before[name])


def test_a_checkpoint_holds_what_trains_and_nothing_frozen(run):
    checkpoint = run.workdir / "checkpoints" / str(STEPS)
    stored = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.load(checkpoint))
    }

    trained = {name: array for name, array in host(run.done.params).items() if name.startswith(TRAINED)}
    assert {
        name.removeprefix("trainable/") for name in stored if name.startswith("trainable/")
    } == trained.keys()
    for name, array in trained.items():
        assert stored["trainable/" + name].dtype == np.float32
        np.testing.assert_array_equal(stored["trainable/" + name], array)
    moments = [name for name in stored if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * len(trained)
    assert all(TRAINED in name or name.rpartition("/")[2] in ("step", "count") for name in stored)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    # Parameters and two moments, and less than 64 KiB about them.
    assert size < 3 * sum(array.nbytes for array in trained.values()) + 65_536


def test_a_finished_run_started_again_trains_nothing(run, workdir, config):
    again = finetune(config, workdir=workdir)

    assert_same_bits(host(again.params), host(run.done.params))
    assert again.metrics == run.done.metrics
    assert losses(workdir) == losses(run.workdir)
    assert (workdir / "examples.jsonl").read_bytes() == (run.workdir / "examples.jsonl").read_bytes()
    assert_same_bits(dict(np.load(workdir / "model.npz")), dict(np.load(run.workdir / "model.npz")))


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(run, config, tmp_path):
    workdir = tmp_path / "work"
    with pytest.raises(Preempted):
        finetune(config, workdir=workdir, should_stop=lambda step: step == EVERY - 2)
    assert EVERY not in metric(workdir, "validation/loss")

    done = finetune(config, workdir=workdir)

    assert metric(workdir, "validation/loss") == metric(run.workdir, "validation/loss")
    name = f"predictions/step_{EVERY:06d}.jsonl"
    assert (workdir / name).read_bytes() == (run.workdir / name).read_bytes()
    assert_same_bits(host(done.params), host(run.done.params))


def test_a_fork_that_trains_other_parameters_is_refused_and_keeps_the_checkpoints(workdir, config):
    other = config.copy_and_resolve_references()
    other.trainable = (("llm/.*", 1.0), (".*", 0.0))
    with pytest.raises(ConfigError, match="Use a new --workdir: .*trainable"):
        finetune(other, workdir=workdir)

    with pytest.raises(WeightsError, match="config.trainable"):
        finetune(other, workdir=workdir, fork=True)

    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(EVERY), str(STEPS)}
    assert not (workdir / "checkpoints_damaged").exists()


def test_a_fork_with_fewer_steps_than_are_done_is_refused(workdir, config):
    other = config.copy_and_resolve_references()
    other.steps = STEPS - 1

    with pytest.raises(ConfigError, match=f"config.steps={STEPS - 1}.*holds step {STEPS}"):
        finetune(other, workdir=workdir, fork=True)


def test_other_base_weights_under_the_same_name_are_refused(run, workdir, config, inputs, tmp_path):
    other = tmp_path / "other.npz"
    shutil.copy(inputs.weights, other)
    try:
        write_weights(inputs.weights, seed=1)
        with pytest.raises(WeightsError, match="other base weights"):
            finetune(config, workdir=workdir)
    finally:
        shutil.copy(other, inputs.weights)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(EVERY), str(STEPS)}


def test_validation_images_that_cannot_be_read_end_the_run_and_are_told(inputs, tmp_path, caplog):
    broken = tmp_path / "validation.jsonl"  # its images lie in another folder
    broken.write_text(inputs.validation.read_text())
    config = tiny_config(inputs, **FIELDS | {"data.validation": str(broken)})

    found = "4 of 4 validation examples cannot be evaluated.*line 1: image .*000000.png"
    with pytest.raises(DataError, match=found):
        finetune(config, workdir=tmp_path / "work")

    assert sum("Not evaluated" in record.getMessage() for record in caplog.records) == 4


def test_predictions_of_steps_that_come_again_are_removed(config, workdir):
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    stale = workdir / "predictions" / f"step_{STEPS:06d}.jsonl"
    stale.write_text('{"prediction": "stale"}\n')
    later = workdir / "predictions" / "step_000099.jsonl"  # of a run that was to be longer
    later.touch()

    finetune(config, workdir=workdir)

    assert "stale" not in stale.read_text() and len(read_jsonl(stale)) == 4
    assert not later.exists()
