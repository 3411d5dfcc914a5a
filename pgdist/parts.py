"""What a config makes of model, mesh, optimizer and step, before any data or weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from pgdist import weights
from pgdist.config import FLOAT_DTYPES, model_config
from pgdist.mesh import batch_sharding, check_batch_size, make_mesh, parameter_shardings
from pgdist.models.flops import training_flops
from pgdist.models.paligemma import PaliGemma, parameter_shapes
from pgdist.parameter_table import describe_parameters
from pgdist.parameters import flatten, learning_rate_scales, unflatten
from pgdist.train.optimizer import decayed_names, make_optimizer, make_schedule
from pgdist.train.state import TrainState, state_shardings
from pgdist.train.step import make_train_step

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Shapes, dtypes and shardings of what the train step takes; frozen is a nested tree, batch {name: array}."""

    state: TrainState
    frozen: PyTree
    batch: Mapping[str, jax.ShapeDtypeStruct]


class Parts:
    """The parts of a training step; public attributes are made once and not changed."""

    def __init__(
        self,
        config: ConfigDict,
        *,
        devices: Sequence[jax.Device] | None = None,
        stored: Mapping[str, weights.ArrayInfo] | None = None,
    ) -> None:
        """devices: those to use, or only to compile for; all by default.  stored: what the file of weights holds, for
        `config.frozen_dtype="file"`.
        """
        self.config = config
        self.mesh: Mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
        check_batch_size(
            config.batch_size,
            devices=self.mesh.size,
            accumulation_steps=config.gradient_accumulation_steps,
        )
        self.model = PaliGemma(model_config(config))
        self.shapes = flatten(parameter_shapes(self.model.config))
        self.scales = learning_rate_scales(self.shapes, config.trainable)
        self.shardings: Mapping[str, NamedSharding] = parameter_shardings(self.mesh, self.shapes)
        trained = {name for name, scale in self.scales.items() if scale}
        self.flops_per_example = training_flops(
            self.model.config,
            text_length=config.data.text_length,
            max_scored_positions=config.data.max_scored_positions,
            trainable=trained,
        )
        self.decayed = decayed_names(trained, config)
        self.optimizer = make_optimizer(config, scales=self.scales, decayed=self.decayed)
        self.parameter_table = describe_parameters(
            self.shapes,
            scales=self.scales,
            decayed=self.decayed,
            frozen_dtypes={name: _frozen_dtype(config, (stored or {}).get(name)) for name in self.shapes},
            shardings=self.shardings,
        )
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
            parameters=self.shardings,
            max_scored_positions=config.data.max_scored_positions,
            label_smoothing=config.loss.label_smoothing,
            attention=config.model.attention,
            accumulation_steps=config.gradient_accumulation_steps,
        )

    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Each parameter by name, in the dtype that it is kept in and on its sharding."""
        return {
            row["name"]: jax.ShapeDtypeStruct(
                tuple(row["shape"]), row["dtype"], sharding=self.shardings[row["name"]]
            )
            for row in self.parameter_table
        }

    def step_inputs(self) -> StepInputs:
        """What the train step takes, without any of it being there."""
        found = self.parameters()
        trainable = unflatten({name: leaf for name, leaf in found.items() if self.scales[name]})
        frozen = unflatten({name: leaf for name, leaf in found.items() if not self.scales[name]})
        opt_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.optimizer.init, trainable),
            self.state_shardings.opt_state,
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.state_shardings.step)
        return StepInputs(
            state=TrainState(step=step, trainable=trainable, opt_state=opt_state),
            frozen=frozen,
            batch=self._batch(),
        )

    def what_saves_memory(self) -> str:
        """The fields of the config that make the step need less memory, for messages."""
        config, rows = self.config, self.config.batch_size // self.mesh.size
        helps = []
        if rows > 1:
            helps.append(f"a smaller config.batch_size (now {config.batch_size}, {rows} rows a device)")
        if rows > config.gradient_accumulation_steps:
            helps.append("a larger config.gradient_accumulation_steps")
        if config.model.remat != "full":
            helps.append(f"--config.model.remat=full (now {config.model.remat})")
        if self.mesh.shape["data"] > 1:
            helps.append(f"a larger config.mesh.fsdp (now {self.mesh.shape['fsdp']})")
        helps.append("more devices")
        return "; ".join(helps)

    def _batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """As `pgdist.data.loader.HostBatch` and the loop make it, of the global batch."""
        rows, length = self.config.batch_size, self.config.data.text_length
        size, sharding = self.model.config.image.image_size, batch_sharding(self.mesh)
        shapes = {"image": ((rows, size, size, 3), jnp.uint8)}
        shapes |= dict.fromkeys(("text", "mask_ar", "mask_loss", "mask_input"), ((rows, length), jnp.int32))
        shapes |= dict.fromkeys(("weight", "truncated", "stop"), ((rows,), jnp.float32))
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in shapes.items()
        }


def _frozen_dtype(config: ConfigDict, stored: weights.ArrayInfo | None) -> str:
    """What a parameter is kept in if it is frozen; one that the file lacks is float32 where the file decides."""
    if config.frozen_dtype != "file":
        return config.frozen_dtype
    return stored.dtype.name if stored is not None and stored.dtype.name in FLOAT_DTYPES else "float32"
