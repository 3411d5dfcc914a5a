"""What training changes, and what it only reads.

`TrainState` holds the step, the trainable parameters as float32 masters and their optimizer state: all of a
checkpoint. Frozen parameters stay beside it in their own dtype, are never differentiated, donated or saved.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pgdist.mesh import replicated

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """step: int32[], updates made.  trainable: nested float32 parameters.  opt_state: the optimizer's."""

    step: jax.Array
    trainable: PyTree
    opt_state: PyTree


def state_shardings(
    optimizer: optax.GradientTransformation, shardings: PyTree, shapes: PyTree, mesh: Mesh
) -> TrainState:
    """The sharding of each array of the state: an optimizer's moments lie where their parameters do.

    shardings, shapes: nested trees of the trainable parameters.
    """
    whole = replicated(mesh)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_shapes, shardings, transform_non_params=lambda _: whole
    )
    return TrainState(step=whole, trainable=shardings, opt_state=opt_shardings)


def init_state(
    optimizer: optax.GradientTransformation, trainable: PyTree, shardings: TrainState
) -> TrainState:
    """The state before the first step; takes over the arrays of `trainable`."""
    # Without out_shardings the optimizer's state would land on one device, and a restore into it too.
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step=step, trainable=trainable, opt_state=opt_state)
