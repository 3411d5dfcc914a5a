"""The real train step on the small model of tests/models, without a run around it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pgdist.config import default_config
from pgdist.mesh import batch_sharding, host_rows, parameter_sharding, put_batch
from pgdist.models import PaliGemma, PaliGemmaConfig
from pgdist.parameters import flatten, unflatten
from pgdist.train.optimizer import make_optimizer, make_schedule
from pgdist.train.state import TrainState, init_state, state_shardings
from pgdist.train.step import TrainStep, make_train_step
from tests.models.small import SMALL, flat_shapes, random_batch, random_parameters

STEPS, BATCH = 20, 8
CONFIG = SMALL["paligemma"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A compiled step and what it needs."""

    step: TrainStep
    shardings: TrainState
    optimizer: Any
    mesh: Mesh
    model: PaliGemmaConfig

    def start(self) -> TrainState:
        """The state before the first step, from random parameters, each on its sharding."""
        shardings = flatten(self.shardings.trainable)
        params = flatten(random_parameters(self.model, seed=0))
        placed = {name: jax.device_put(array, shardings[name]) for name, array in params.items()}
        return init_state(self.optimizer, unflatten(placed), self.shardings)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a global batch."""
        sharding, size = batch_sharding(self.mesh), len(batch["weight"])
        rows = host_rows(sharding, size)
        return put_batch({name: x[rows] for name, x in batch.items()}, sharding=sharding, batch_size=size)


def small_training(
    mesh: Mesh,
    *,
    optimizer: str = "sgd",
    learning_rate: float = 0.01,
    model: PaliGemmaConfig = CONFIG,
    accumulation_steps: int = 1,
) -> Training:
    """All parameters train, in float32, with the cosine schedule."""
    config = default_config()
    config.steps, config.optimizer.name, config.optimizer.learning_rate = STEPS, optimizer, learning_rate
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in flat_shapes(model).items()}
    transformation = make_optimizer(config, scales=dict.fromkeys(shapes, 1.0), decayed=set())
    placement = {name: parameter_sharding(mesh, name, leaf.shape) for name, leaf in shapes.items()}
    shardings = state_shardings(transformation, unflatten(placement), unflatten(shapes), mesh)
    step = make_train_step(
        PaliGemma(model),
        transformation,
        make_schedule(config),
        mesh=mesh,
        shardings=shardings,
        parameters=placement,
        accumulation_steps=accumulation_steps,
    )
    return Training(step=step, shardings=shardings, optimizer=transformation, mesh=mesh, model=model)


def batch_of_step(step: int) -> dict[str, np.ndarray]:
    """Texts of unequal lengths; one row of each batch is masked."""
    rng = np.random.default_rng(step)
    prefixes, suffixes = rng.integers(2, 7, BATCH).tolist(), rng.integers(1, 8, BATCH).tolist()
    batch = random_batch(CONFIG, prefixes=prefixes, suffixes=suffixes, length=14, seed=step)
    batch["weight"][step % BATCH] = 0.0
    batch["stop"] = np.zeros(BATCH, np.float32)
    return batch
