"""The parts of a fine-tuning run that its config decides, built in an order in which mistakes show early."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from pgdist import cluster, hub, weights
from pgdist.checkpoint import Checkpoints
from pgdist.config import check_vocabulary, evaluation_sampling
from pgdist.data.bad_records import refuse_bad_share
from pgdist.data.jsonl import JsonlSource, fingerprint
from pgdist.data.loader import HostBatches, train_batches
from pgdist.data.tokenizer import Tokenizer
from pgdist.environment import describe_environment
from pgdist.errors import DataError
from pgdist.evaluate import metrics
from pgdist.evaluate.runner import Evaluator, Prediction, mean_score
from pgdist.mesh import batch_sharding, host_rows
from pgdist.models.paligemma import PaliGemma
from pgdist.models.presets import preset_layouts
from pgdist.parameter_table import format_table, warn_of_replication
from pgdist.parameters import flatten, unflatten
from pgdist.parts import Parts
from pgdist.report import describe_timing, load_run, write_report
from pgdist.report.examples import describe_examples
from pgdist.telemetry import (
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    NullWriter,
    ProgressBar,
    TensorBoardWriter,
)
from pgdist.train.compilation import BackgroundStep
from pgdist.train.profile import NoProfiler, ProfiledSteps, Profiler
from pgdist.train.state import TrainState, init_state
from pgdist.train.step import make_validation_step
from pgdist.workdir import Workdir, write_json, write_jsonl

PyTree = Any
_SHOWN_EXAMPLES = 8  # of the first batch, in the report
_INIT_HINT = (
    "What either lacks on purpose is named in --config.init_skip; a tower in a file of its own is added to "
    "--config.init after a comma."
)


class Job:
    """The parts of a run that its config alone decides."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        *,
        devices: Sequence[jax.Device] | None = None,
        profile: ProfiledSteps | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._profile = profile
        self.config = config
        self.workdir = workdir
        self.tokenizer = Tokenizer(hub.fetch_file(config.tokenizer, field="config.tokenizer"))
        self.train_source = self._open_source(config.data.train, field="config.data.train")
        self.validation_source = None
        if config.data.validation:
            self.validation_source = self._open_source(config.data.validation, field="config.data.validation")
        check_vocabulary(config, self.tokenizer.vocab_size)
        # A wrong path is an error now, not after all that follows.
        stored = weights.read_header(config.init) if config.init else {}
        self.parts = Parts(config, devices=devices, stored=stored)
        self.mesh, self.model = self.parts.mesh, self.parts.model
        self.parameter_table = self.parts.parameter_table
        self.rows = host_rows(batch_sharding(self.mesh), config.batch_size).tolist()
        self.evaluator = self._make_evaluator()

    def load_weights(self) -> tuple[PyTree, TrainState]:
        """(frozen parameters, the state before the first step), from `config.init` or at random."""
        config, arrays, parts = self.config, {}, self.parts
        expected = parts.parameters()
        if config.init:
            arrays = weights.load(
                config.init,
                expected=expected,
                shardings=parts.shardings,
                skip=config.init_skip,
                seed=config.seed,
                allow_non_finite=config.init_allow_non_finite,
                layouts=preset_layouts,
                hint=_INIT_HINT,
            )
        if fresh := {name: leaf for name, leaf in expected.items() if name not in arrays}:
            if arrays:
                logging.info("Begin at random numbers, as config.init_skip says: %s.", ", ".join(fresh))
            arrays |= _random_weights(self.model, fresh, parts.shardings, seed=config.seed)
        frozen = {name: array for name, array in arrays.items() if not parts.scales[name]}
        trainable = {name: array for name, array in arrays.items() if parts.scales[name]}
        return unflatten(frozen), init_state(parts.optimizer, unflatten(trainable), parts.state_shardings)

    def compile_step(self) -> BackgroundStep:
        """The training step, which is compiled while this process goes on."""
        inputs = self.parts.step_inputs()
        return BackgroundStep(
            self.parts.train_step,
            inputs.state,
            inputs.frozen,
            inputs.batch,
            saves_memory=self.parts.what_saves_memory(),
        )

    def open_checkpoints(self) -> Checkpoints:
        """The run's checkpoints, which belong to its base weights."""
        base = (
            weights.fingerprint(self.config.init) if self.config.init else f"random, seed {self.config.seed}"
        )
        return Checkpoints(
            self.workdir.checkpoints,
            keep=self.config.checkpoint.keep,
            belongs_to={"base_weights": base},
            before_save=self.workdir.sync,
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

    def open_profiler(self) -> Profiler | NoProfiler:
        """Of the steps that were asked for, on process 0: the others' steps are the same program."""
        if self._profile is None or not cluster.is_primary():
            return NoProfiler()
        return Profiler(self._profile, self.workdir.profile)

    def seconds_since_start(self) -> float:
        """Wall time since this object began to be made."""
        return time.perf_counter() - self._started

    def must_evaluate_first(self, step: int) -> bool:
        """Whether the state that a run starts from is to be evaluated: at both ends, and where the run before
        stopped between a save and the evaluation that was due.
        """
        if self.evaluator is None:
            return False
        due = self.config.eval.every and step % self.config.eval.every == 0
        is_done = cluster.all_agree(not cluster.is_primary() or self.workdir.predictions(step).exists())
        return step in (0, self.config.steps) or (due and not is_done)

    def evaluate(
        self, step: int, state: TrainState, frozen: PyTree, *, before_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Metrics of the state by name, none without validation data; its predictions go to the workdir.

        before_batch: called before each; what it raises, in all processes at once, ends the evaluation.
        """
        if self.evaluator is None:
            return {}
        config = self.config.eval
        at_an_end = step in (0, self.config.steps)
        limit = (config.final_examples or None) if at_an_end else config.examples
        losses = self.evaluator.validation_loss(state.trainable, frozen, before_batch=before_batch)
        found = {f"validation/{name}": value for name, value in losses.items()}
        answers = list(
            self.evaluator.predict(state.trainable, frozen, limit=limit, before_batch=before_batch)
        )
        predictions = [answer for answer in answers if answer.error is None]
        self._judge_errors([answer.error for answer in answers if answer.error is not None], of=len(answers))
        if at_an_end:
            found[f"validation/{config.metric}"] = mean_score(predictions)
        if cluster.is_primary():
            write_jsonl(
                self.workdir.predictions(step), [_prediction_row(p, config.metric) for p in predictions]
            )
            self.write_report()
        return found

    def _judge_errors(self, errors: Sequence[str], *, of: int) -> None:
        """Warns of validation examples that have no answer; DataError where they are too many."""
        for error in errors:
            logging.warning("Not evaluated: %s", error)
        if len(errors) > self.config.data.max_bad_share * of:
            raise DataError(
                f"{len(errors)} of {of} validation examples cannot be evaluated, more than the share of "
                f"{self.config.data.max_bad_share:g} allowed by config.data.max_bad_share; the first: "
                f"{errors[0]}"
            )

    def forget_predictions(self, *, after: int) -> None:
        """Removes what an earlier attempt predicted at steps that are still to come."""
        if cluster.is_primary():
            for path in self.workdir.path.glob("predictions/step_*.jsonl"):
                if path > self.workdir.predictions(after):
                    path.unlink()

    def log_descriptions(self) -> None:
        """The table of parameters and what the data is, for people to read."""
        if cluster.is_primary():
            sizes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
            logging.info("Parameters on a mesh of %s:\n%s", sizes, format_table(self.parameter_table))
            warn_of_replication(self.parameter_table, fsdp=self.mesh.shape["fsdp"])
            logging.info("Training data: %s: %s", self.config.data.train, fingerprint(self.train_source))

    def write_descriptions(self) -> None:
        """What runs on what: the table of parameters and the environment, in the workdir."""
        if cluster.is_primary():
            write_json(self.workdir.parameters, self.parameter_table)
            write_json(self.workdir.environment, describe_environment())

    def write_examples(self) -> None:
        """The first rows of the first batch as the model sees them, for the report."""
        if not cluster.is_primary():
            return
        with self.open_batches(0) as batches:
            batch = next(batches)
        write_jsonl(self.workdir.examples, describe_examples(batch, self.tokenizer, limit=_SHOWN_EXAMPLES))

    def log_timing(self) -> None:
        """Where the run's time went, as the report shows it."""
        if cluster.is_primary():
            logging.info("%s", describe_timing(load_run(self.workdir.path)))

    def write_report(self) -> None:
        """report.html, by process 0; a full disk costs the report, not the run."""
        if cluster.is_primary():
            try:
                write_report(self.workdir.path)
            except OSError as error:
                logging.warning("The report could not be written: %s", error)

    def _open_source(self, path: str, *, field: str) -> JsonlSource:
        """Opens the data and reads all its text once, so that bad files stop the run before it starts."""
        data = self.config.data
        local = hub.fetch_examples(path, field=field)
        source = JsonlSource(local, prefix=data.prefix or None, lowercase=data.lowercase)
        refuse_bad_share(source.check(), num_examples=len(source), max_share=data.max_bad_share)
        return source

    def _make_evaluator(self) -> Evaluator | None:
        # A wrong name is an error now, not at the first evaluation.
        metric = metrics.metric(self.config.eval.metric)
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
            sampling=evaluation_sampling(self.config),
            validation_step=make_validation_step(
                self.model,
                mesh=self.mesh,
                parameters=self.parts.shardings,
                max_scored_positions=self.config.data.max_scored_positions,
                attention=self.config.model.attention,
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

    return jax.jit(init, out_shardings={name: shardings[name] for name in expected})()


def _prediction_row(prediction: Prediction, metric: str) -> dict[str, Any]:
    row = dataclasses.asdict(prediction)
    score, extra, _, _ = (row.pop(name) for name in ("score", "extra", "error", "candidates"))
    row |= {} if score is None else {"score": {metric: score}}
    return row | {name: value for name, value in extra.items() if name not in row}
