"""One training step and one validation step, jitted over the mesh.

What differs between devices is said explicitly, in `jax.shard_map`: each computes the loss of its rows of the batch;
parameters come together layer by layer, and gradients go back to where their parameters live (`gathering`). The
optimizer's update is the same on every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from pgdist.mesh import batch_sharding, replicated
from pgdist.models.paligemma import PaliGemma
from pgdist.parameters import merge
from pgdist.train.gathering import ShardedModel
from pgdist.train.objective import BatchLoss
from pgdist.train.state import TrainState

PyTree = Any
Batch = Mapping[str, jax.Array]
TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: PaliGemma,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    mesh: Mesh,
    shardings: TrainState,
    parameters: Mapping[str, NamedSharding],
    max_scored_positions: int = 0,
    label_smoothing: float = 0.0,
    attention: str = "auto",
    accumulation_steps: int = 1,
) -> TrainStep:
    """step(state, frozen, batch) -> (state, metrics); the state is donated, frozen parameters are only read.

    parameters: where each parameter lives, trainable and frozen, by name.  accumulation_steps: microbatches that the
    batch is computed in, see `accumulation`.

    Metrics are float32[]: loss (mean over examples, nats), grad_norm (before clipping), relative_rate (of
    the schedule), examples and tokens (unmasked rows and their scored tokens), truncated (rows whose text
    did not fit), finite (1 if loss, gradients and updated parameters were), stop (1 if any row's batch["stop"]
    is: some process wishes to stop). A step that is not finite changes nothing but the step counter.
    """
    sharded = ShardedModel(model, mesh=mesh, parameters=parameters, attention=attention)

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, sums, gradients = sharded.loss_and_gradients(
            state.trainable,
            frozen,
            batch,
            max_scored_positions=max_scored_positions,
            label_smoothing=label_smoothing,
            accumulation_steps=accumulation_steps,
        )
        grad_norm = optax.tree.norm(gradients)
        rate = schedule(state.step)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        for leaf in jax.tree.leaves(trainable):  # a finite gradient times a huge rate may not be
            finite &= jnp.all(jnp.isfinite(leaf))

        def keep_finite(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            trainable=keep_finite(trainable, state.trainable),
            opt_state=keep_finite(opt_state, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "relative_rate": rate,
            "examples": sums.examples,
            "tokens": sums.tokens,
            "truncated": jnp.sum(batch["truncated"]),
            "finite": finite.astype(jnp.float32),
            "stop": jnp.max(batch["stop"]),
        }
        return new_state, metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def make_validation_step(
    model: PaliGemma,
    *,
    mesh: Mesh,
    parameters: Mapping[str, NamedSharding],
    max_scored_positions: int = 0,
    attention: str = "auto",
) -> Callable[[PyTree, PyTree, Batch], BatchLoss]:
    """validate(trainable, frozen, batch) -> sums over the batch, without label smoothing."""
    sharded = ShardedModel(model, mesh=mesh, parameters=parameters, attention=attention)

    def validate(trainable: PyTree, frozen: PyTree, batch: Batch) -> BatchLoss:
        return sharded.loss(merge(trainable, frozen), batch, max_scored_positions=max_scored_positions)

    return jax.jit(validate, in_shardings=(None, None, batch_sharding(mesh)), out_shardings=replicated(mesh))
