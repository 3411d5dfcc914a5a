"""Compiling the very step that a run would make, for devices that are here or only described."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from pgdist.parameter_table import warn_of_replication
from pgdist.parts import Parts
from pgdist.plan.compiled import Compiled, compile_lowered
from pgdist.plan.program import Program, read_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A training step as compiled.

    flops: of the model in a step, a device's share, as MFU counts them.  program: None where the compiler gives no
    estimates.
    """

    compiled: Compiled
    flops: float
    program: Program | None


def compile_train_step(config: ConfigDict, *, devices: Sequence[jax.Device] | None = None) -> CompiledStep:
    """Compiles the train step of a config; reads no data and no weights.

    devices: present or described (`describe_devices`); all present ones by default.

    Raises ConfigError where the devices cannot share the batch, and where the step does not fit their memory.
    """
    parts = Parts(config, devices=devices)
    warn_of_replication(parts.parameter_table, fsdp=parts.mesh.shape["fsdp"])
    inputs = parts.step_inputs()
    compiled = compile_lowered(
        parts.train_step.lower(inputs.state, inputs.frozen, inputs.batch),
        mesh=parts.mesh,
        batch_size=config.batch_size,
        saves_memory=parts.what_saves_memory(),
    )
    return CompiledStep(
        compiled=compiled,
        flops=parts.flops_per_example * config.batch_size / parts.mesh.size,
        program=None if compiled.chip is None else read_program(compiled.text, compiled.chip),
    )
