"""The main job from a config to a trained model: everything the other rooms offer, put together in order.

config -> mesh -> model -> weights onto their shards -> state (restored, if there is one) -> loop ->
model.npz, report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgdist import cluster, weights
from pgdist.checkpoint import Checkpoints
from pgdist.config import check_vocabulary, model_config, validate_config
from pgdist.data.bad_records import BadRecordLog, BadShare, refuse_bad_share
from pgdist.data.jsonl import JsonlSource, fingerprint
from pgdist.data.loader import HostBatches, train_batches
from pgdist.data.tokenizer import Tokenizer
from pgdist.environment import describe_environment
from pgdist.errors import ConfigError
from pgdist.evaluate import metrics
from pgdist.evaluate.runner import Evaluator, Prediction, mean_score
from pgdist.mesh import batch_sharding, host_rows, make_mesh, parameter_shardings
from pgdist.models.paligemma import PaliGemma, parameter_shapes
from pgdist.models.presets import preset_layouts
from pgdist.parameters import flatten, learning_rate_scales, merge, unflatten
from pgdist.report import write_report
from pgdist.report.examples import describe_examples
from pgdist.telemetry import (
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    NullWriter,
    ProgressBar,
    TensorBoardWriter,
)
from pgdist.train.loop import Loop
from pgdist.train.optimizer import decayed_names, make_optimizer, make_schedule
from pgdist.train.state import TrainState, init_state, state_shardings
from pgdist.train.step import make_train_step, make_validation_step
from pgdist.workdir import Workdir, write_json, write_jsonl

PyTree = Any
_SHOWN_EXAMPLES = 8  # of the first batch, in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A trained model: what decodes (`model`, `params`, `tokenizer`), and its last evaluation's metrics."""

    model: PaliGemma
    params: PyTree
    tokenizer: Tokenizer
    metrics: Mapping[str, float]


def finetune(
    config: ConfigDict,
    *,
    workdir: str | os.PathLike[str],
    should_stop: Callable[[int], bool] = lambda step: False,
    fork: bool = False,
    writers: Sequence[MetricWriter] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Finetuned:
    """Fine-tunes as the config says, going on from the newest checkpoint in `workdir` if there is one.

    config: see `pgdist.config.default_config`.  should_stop: asked after each update; True saves and raises
    Preempted.
    fork: go on in a workdir that another config began.  writers: take the metrics beside metrics.jsonl and
    TensorBoard.  devices: those to use; all by default.
    All processes of a job call this together. Raises UserError subclasses for what its user can mend.
    """
    validate_config(config)
    job = _Job(config, Workdir(workdir), devices=devices)
    job.workdir.check(config, fork=fork)
    job.log_descriptions()
    frozen, state = job.load_weights()
    job.workdir.make()
    checkpoints = job.open_checkpoints()
    with contextlib.closing(checkpoints):
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = checkpoints.restore(abstract)
        state = state if restored is None else restored
        if state.step > config.steps:
            raise ConfigError(
                f"config.steps={config.steps}, but --workdir={workdir} holds step {state.step} already. "
                "Train for more steps, or use a new --workdir."
            )
        # Only now, when nothing wrong with weights or checkpoints can stop the run, is it one of this config.
        job.workdir.record(config)
        job.write_descriptions()
        return _train(job, state, frozen, checkpoints=checkpoints, should_stop=should_stop, writers=writers)


def _train(
    job: _Job,
    state: TrainState,
    frozen: PyTree,
    *,
    checkpoints: Checkpoints,
    should_stop: Callable[[int], bool],
    writers: Sequence[MetricWriter],
) -> Finetuned:
    config, first = job.config, int(state.step)
    found: dict[str, float] = {}
    with contextlib.closing(job.open_writers(first, writers)) as writer, job.open_batches(first) as batches:

        def evaluate(step: int, state: TrainState) -> dict[str, float]:
            found.clear()  # an evaluation on the way has fewer metrics than the first one
            found.update(job.evaluate(step, state, frozen))
            return dict(found)

        if first < config.steps:
            job.write_examples()
        if first == config.steps:
            logging.info("All %d steps are done already; evaluating what is there.", first)
        if job.must_evaluate_first(first):
            writer.write(first, evaluate(first, state))
        loop = Loop(
            step=job.train_step,
            frozen=frozen,
            mesh=job.mesh,
            batches=batches,
            batch_size=config.batch_size,
            total_steps=config.steps,
            base_learning_rate=config.optimizer.learning_rate,
            sequence_length=job.model.config.image.num_tokens + config.data.text_length - 1,
            writer=writer,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            evaluate=evaluate,
            evaluate_every=config.eval.every,
            should_stop=should_stop,
            bad_records=BadRecordLog(job.workdir.bad_records(jax.process_index())),
            bad_share=BadShare(
                num_examples=len(job.train_source),
                max_share=config.data.max_bad_share,
                first_row=first * config.batch_size,
            ),
            patience=config.patience,
        )
        state = loop.run(state)
    params = merge(state.trainable, frozen)
    if config.export:
        weights.save(job.workdir.model, flatten(params))
    job.write_report()
    return Finetuned(model=job.model, params=params, tokenizer=job.tokenizer, metrics=found)


class _Job:
    """The parts of a run that its config alone decides."""

    def __init__(
        self, config: ConfigDict, workdir: Workdir, *, devices: Sequence[jax.Device] | None = None
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.mesh: Mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
        self.rows = host_rows(batch_sharding(self.mesh), config.batch_size).tolist()
        self.tokenizer = Tokenizer(config.tokenizer)
        self.train_source = self._open_source(config.data.train)
        self.validation_source = self._open_source(config.data.validation) if config.data.validation else None
        check_vocabulary(config, self.tokenizer.vocab_size)
        self.model = PaliGemma(model_config(config))
        self.shapes = flatten(parameter_shapes(self.model.config))
        self.scales = learning_rate_scales(self.shapes, config.trainable)
        self.shardings = parameter_shardings(self.mesh, self.shapes)
        trained = {name for name, scale in self.scales.items() if scale}
        self.decayed = decayed_names(trained, config)
        self.optimizer = make_optimizer(config, scales=self.scales, decayed=self.decayed)
        trainable_shapes = unflatten({name: self.shapes[name] for name in trained})
        trainable_shardings = unflatten({name: self.shardings[name] for name in trained})
        self.state_shardings = state_shardings(
            self.optimizer, trainable_shardings, trainable_shapes, self.mesh
        )
        self.train_step = make_train_step(
            self.model,
            self.optimizer,
            make_schedule(config),
            mesh=self.mesh,
            shardings=self.state_shardings,
            max_scored_positions=config.data.max_scored_positions,
            label_smoothing=config.loss.label_smoothing,
        )
        self.evaluator = self._make_evaluator()

    def load_weights(self) -> tuple[PyTree, TrainState]:
        """(frozen parameters, the state before the first step), from `config.init` or at random."""
        dtypes = {
            name: jnp.dtype("float32" if scale else self.config.frozen_dtype)
            for name, scale in self.scales.items()
        }
        expected = {
            name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in self.shapes.items()
        }
        if self.config.init:
            arrays = weights.load(
                self.config.init, expected=expected, shardings=self.shardings, layouts=preset_layouts
            )
        else:
            arrays = _random_weights(self.model, expected, self.shardings, seed=self.config.seed)
        frozen = {name: array for name, array in arrays.items() if not self.scales[name]}
        trainable = {name: array for name, array in arrays.items() if self.scales[name]}
        return unflatten(frozen), init_state(self.optimizer, unflatten(trainable), self.state_shardings)

    def open_checkpoints(self) -> Checkpoints:
        """The run's checkpoints, which belong to its base weights."""
        base = (
            weights.fingerprint(self.config.init) if self.config.init else f"random, seed {self.config.seed}"
        )
        return Checkpoints(
            self.workdir.checkpoints, keep=self.config.checkpoint.keep, belongs_to={"base_weights": base}
        )

    def open_batches(self, first_step: int) -> HostBatches:
        """This process's rows of the steps from `first_step` on."""
        return train_batches(
            source=self.train_source,
            tokenizer=self.tokenizer,
            image_size=self.model.config.image.image_size,
            text_length=self.config.data.text_length,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            rows=self.rows,
            start_step=first_step,
            num_steps=self.config.steps - first_step,
            workers=self.config.data.workers,
        )

    def open_writers(self, first_step: int, others: Sequence[MetricWriter]) -> MetricWriter:
        """Where metrics go: files and progress on process 0, nowhere on the others."""
        if not cluster.is_primary():
            return NullWriter()
        return MultiWriter(
            [
                JsonlWriter(self.workdir.metrics, resume_step=first_step if first_step else -1),
                TensorBoardWriter(self.workdir.tensorboard, resume_step=first_step if first_step else -1),
                ProgressBar(self.config.steps, first_step),
                *others,
            ]
        )

    def must_evaluate_first(self, step: int) -> bool:
        """Whether the state that a run starts from is to be evaluated: at both ends, and where the run before
        stopped between a save and the evaluation that was due.
        """
        if self.evaluator is None:
            return False
        due = self.config.eval.every and step % self.config.eval.every == 0
        is_done = cluster.all_agree(not cluster.is_primary() or self.workdir.predictions(step).exists())
        return step in (0, self.config.steps) or (due and not is_done)

    def evaluate(self, step: int, state: TrainState, frozen: PyTree) -> dict[str, float]:
        """Metrics of the state by name, none without validation data; its predictions go to the workdir."""
        if self.evaluator is None:
            return {}
        config = self.config.eval
        at_an_end = step in (0, self.config.steps)
        limit = (config.final_examples or None) if at_an_end else config.examples
        losses = self.evaluator.validation_loss(state.trainable, frozen)
        found = {f"validation/{name}": value for name, value in losses.items()}
        predictions = [
            p for p in self.evaluator.predict(state.trainable, frozen, limit=limit) if p.error is None
        ]
        if at_an_end:
            found[f"validation/{config.metric}"] = mean_score(predictions)
        if cluster.is_primary():
            write_jsonl(
                self.workdir.predictions(step), [_prediction_row(p, config.metric) for p in predictions]
            )
            self.write_report()
        return found

    def log_descriptions(self) -> None:
        """The table of parameters and what the data is, for people to read."""
        if cluster.is_primary():
            logging.info("Parameters:\n%s", _format_table(self._parameter_table()))
            logging.info("Training data: %s: %s", self.config.data.train, fingerprint(self.train_source))

    def write_descriptions(self) -> None:
        """What runs on what: the table of parameters and the environment, in the workdir."""
        if cluster.is_primary():
            write_json(self.workdir.parameters, self._parameter_table())
            write_json(self.workdir.environment, describe_environment())

    def _parameter_table(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "shape": list(leaf.shape),
                "dtype": "float32" if self.scales[name] else self.config.frozen_dtype,
                "trainable": bool(self.scales[name]),
                "lr_scale": self.scales[name],
                "decay": name in self.decayed,
                "sharding": _describe_sharding(self.shardings[name].spec),
                "bytes": math.prod(leaf.shape)
                * (4 if self.scales[name] else jnp.dtype(self.config.frozen_dtype).itemsize),
            }
            for name, leaf in self.shapes.items()
        ]

    def write_examples(self) -> None:
        """The first rows of the first batch as the model sees them, for the report."""
        if not cluster.is_primary():
            return
        with self.open_batches(0) as batches:
            batch = next(batches)
        write_jsonl(self.workdir.examples, describe_examples(batch, self.tokenizer, limit=_SHOWN_EXAMPLES))

    def write_report(self) -> None:
        """report.html, by process 0."""
        if cluster.is_primary():
            write_report(self.workdir.path)

    def _open_source(self, path: str) -> JsonlSource:
        """Opens the data and reads all its text once, so that bad files stop the run before it starts."""
        data = self.config.data
        source = JsonlSource(path, prefix=data.prefix, lowercase=data.lowercase)
        refuse_bad_share(source.check(), num_examples=len(source), max_share=data.max_bad_share)
        return source

    def _make_evaluator(self) -> Evaluator | None:
        metric = metrics.metric(
            self.config.eval.metric
        )  # a wrong name is an error now, not at the first evaluation
        if self.validation_source is None:
            return None
        return Evaluator(
            model=self.model,
            mesh=self.mesh,
            source=self.validation_source,
            tokenizer=self.tokenizer,
            text_length=self.config.data.text_length,
            batch_size=self.config.batch_size,
            max_new_tokens=self.config.eval.max_new_tokens,
            metric=metric,
            validation_step=make_validation_step(
                self.model, mesh=self.mesh, max_scored_positions=self.config.data.max_scored_positions
            ),
        )


def _random_weights(
    model: PaliGemma, expected: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Any], *, seed: int
) -> dict[str, jax.Array]:
    size = model.config.image.image_size

    def init() -> dict[str, jax.Array]:
        image, text = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 2), jnp.int32)
        params = flatten(model.init(jax.random.key(seed), image, text, text)["params"])
        return {name: params[name].astype(leaf.dtype) for name, leaf in expected.items()}

    return jax.jit(init, out_shardings=dict(shardings))()


def _prediction_row(prediction: Prediction, metric: str) -> dict[str, Any]:
    row = dataclasses.asdict(prediction)
    score, extra, _ = row.pop("score"), row.pop("extra"), row.pop("error")
    row |= {} if score is None else {"score": {metric: score}}
    return row | {name: value for name, value in extra.items() if name not in row}


def _describe_sharding(spec: Sequence[str | None]) -> str:
    return f"fsdp on axis {list(spec).index('fsdp')}" if "fsdp" in spec else "whole"


def _format_table(table: Sequence[Mapping[str, Any]]) -> str:
    rows = [("name", "shape", "dtype", "trainable", "sharding")]
    for row in table:
        trains = "frozen"
        if row["trainable"]:
            trains = f"lr x {row['lr_scale']:g}" + (", decays" if row["decay"] else "")
        rows.append((row["name"], json.dumps(row["shape"]), row["dtype"], trains, row["sharding"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    trained = sum(math.prod(row["shape"]) for row in table if row["trainable"])
    total = sum(math.prod(row["shape"]) for row in table)
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters train."])
