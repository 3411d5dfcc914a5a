"""The main job from a config to a trained model: everything the other rooms offer, put together in order.

config -> mesh -> model -> weights onto their shards -> state (restored, if there is one) -> loop ->
model.npz, report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from pgdist import cluster, health, heartbeat, program_cache, weights
from pgdist.checkpoint import Checkpoints
from pgdist.config import validate_config
from pgdist.data.bad_records import BadRecordLog, BadShare
from pgdist.data.jsonl import fingerprint
from pgdist.data.tokenizer import Tokenizer
from pgdist.errors import ConfigError
from pgdist.job import Job
from pgdist.models.paligemma import PaliGemma
from pgdist.parameters import flatten, merge
from pgdist.stop import StopVoted
from pgdist.telemetry import MetricWriter
from pgdist.train.loop import Loop
from pgdist.train.profile import ProfiledSteps
from pgdist.train.state import TrainState
from pgdist.train.step import TrainStep
from pgdist.workdir import Workdir

PyTree = Any


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
    profile: ProfiledSteps | None = None,
) -> Finetuned:
    """Fine-tunes as the config says, going on from the newest checkpoint in `workdir` if there is one.

    config: see `pgdist.config.default_config`.  should_stop: asked before each update, with the number made, and
    while evaluating; True in any process saves after the same update in all, and raises Preempted.
    fork: go on in a workdir that another config began.  writers: take the metrics beside metrics.jsonl and
    TensorBoard.  devices: those to use; all by default.  profile: steps of which process 0 takes a trace.
    All processes of a job call this together. Raises UserError subclasses for what its user can mend.
    """
    heartbeat.beat("loading")
    validate_config(config)
    if profile is not None:
        profile.check(config.steps)
    health.check(config)
    with Workdir(workdir) as folder:
        job = Job(config, folder, devices=devices, profile=profile)
        return _finetune(job, should_stop=should_stop, fork=fork, writers=writers)


def _finetune(
    job: Job, *, should_stop: Callable[[int], bool], fork: bool, writers: Sequence[MetricWriter]
) -> Finetuned:
    config, data = job.config, fingerprint(job.train_source)
    base = weights.fingerprint(config.init) if config.init else "none"
    validation = "none" if job.validation_source is None else fingerprint(job.validation_source)
    health.compare(
        {"training data": data, "validation data": validation, "config.init (checksums)": base}, name="inputs"
    )
    job.workdir.check(config, fork=fork, data=data)
    job.log_descriptions()
    # Not before: only a run that can begin makes a folder.
    program_cache.open_cache(job.workdir.name)
    step = job.compile_step()  # while the weights and the checkpoint are read
    frozen, state = job.load_weights()
    job.workdir.make()
    checkpoints = job.open_checkpoints()
    with contextlib.closing(checkpoints):
        if checkpoints.latest() is not None:
            abstract = jax.tree.map(_abstract, state)
            del state  # the one to be restored needs its memory
            state = checkpoints.restore(abstract)
        if state.step > config.steps:
            raise ConfigError(
                f"config.steps={config.steps}, but --workdir={job.workdir.name} holds step {state.step} already. "
                "Train for more steps with --fork, or use a new --workdir."
            )
        # Only now, when nothing wrong with weights or checkpoints can stop the run, is it one of this config.
        job.workdir.record(config, data=data)
        job.write_descriptions()
        return _train(
            job, step, state, frozen, checkpoints=checkpoints, should_stop=should_stop, writers=writers
        )


def _train(
    job: Job,
    step: TrainStep,
    state: TrainState,
    frozen: PyTree,
    *,
    checkpoints: Checkpoints,
    should_stop: Callable[[int], bool],
    writers: Sequence[MetricWriter],
) -> Finetuned:
    config, first = job.config, int(state.step)
    found: dict[str, float] = {}
    with (
        contextlib.closing(job.open_writers(first, writers)) as writer,
        contextlib.closing(job.open_profiler()) as profiler,
        job.open_batches(first) as batches,
    ):

        def evaluate(step: int, state: TrainState) -> dict[str, float]:
            def before_batch() -> None:
                heartbeat.beat("evaluating")
                if cluster.any_process(should_stop(step)):
                    raise StopVoted

            found.clear()  # an evaluation on the way has fewer metrics than the first one
            found.update(job.evaluate(step, state, frozen, before_batch=before_batch))
            return dict(found)

        job.forget_predictions(after=first)
        if first < config.steps:
            job.write_examples()
        if first == config.steps:
            logging.info("All %d steps are done already; evaluating what is there.", first)
        loop = Loop(
            step=step,
            frozen=frozen,
            mesh=job.mesh,
            batches=batches,
            batch_size=config.batch_size,
            total_steps=config.steps,
            base_learning_rate=config.optimizer.learning_rate,
            sequence_length=job.model.config.image.num_tokens + config.data.text_length - 1,
            flops_per_example=job.parts.flops_per_example,
            writer=writer,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            evaluate=evaluate,
            evaluate_every=config.eval.every,
            evaluate_first=job.must_evaluate_first(first),
            should_stop=should_stop,
            bad_records=BadRecordLog(job.workdir.bad_records(jax.process_index())),
            bad_share=BadShare(
                num_examples=len(job.train_source),
                max_share=config.data.max_bad_share,
                first_row=first * config.batch_size,
            ),
            patience=config.patience,
            profiler=profiler,
        )
        writer.write(first, {"time/loading_seconds": job.seconds_since_start()})
        try:
            state = loop.run(state)
        finally:
            job.log_timing()
    heartbeat.beat("finishing")
    params = merge(state.trainable, frozen)
    if config.export:
        cluster.together(lambda: weights.save(job.workdir.model, flatten(params)))
    job.write_report()
    return Finetuned(model=job.model, params=params, tokenizer=job.tokenizer, metrics=found)


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
