"""Compiling the very step that a run would make, for devices that are here or only described."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from pgdist.chips import Chip, chip_of
from pgdist.parameter_table import warn_of_replication
from pgdist.parts import Parts
from pgdist.plan.program import Program, read_program
from pgdist.train.compilation import compile_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A step as compiled.

    batch_size: rows of all devices.  seconds: that compiling took.  memory: bytes at most, of one device, of which
    `arguments` are state, weights and batch, and `temporaries` what the step makes and forgets.  flops: of the model
    in a step, a device's share, as MFU counts them.  text: the program.  chip, program: None for devices whose
    compiler gives no estimates.
    """

    devices: str
    mesh: dict[str, int]
    batch_size: int
    seconds: float
    memory: int
    arguments: int
    temporaries: int
    flops: float
    text: str
    chip: Chip | None
    program: Program | None


def compile_train_step(config: ConfigDict, *, devices: Sequence[jax.Device] | None = None) -> CompiledStep:
    """Compiles the train step of a config; reads no data and no weights.

    devices: present or described (`describe_devices`); all present ones by default.

    Raises ConfigError where the devices cannot share the batch, and where the step does not fit their memory.
    """
    parts = Parts(config, devices=devices)
    warn_of_replication(parts.parameter_table, fsdp=parts.mesh.shape["fsdp"])
    inputs = parts.step_inputs()
    started = time.perf_counter()
    lowered = parts.train_step.lower(inputs.state, inputs.frozen, inputs.batch)
    compiled = compile_program(lowered, saves_memory=parts.what_saves_memory()).program
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    device = parts.mesh.devices.flat[0]
    chip = chip_of(device)
    return CompiledStep(
        devices=f"{parts.mesh.size} x {device.device_kind}",
        mesh=dict(parts.mesh.shape),
        batch_size=config.batch_size,
        seconds=seconds,
        # Compilers for others than TPUs leave most out of the peak.
        memory=memory.peak_memory_in_bytes if chip else arguments + temporaries,
        arguments=arguments,
        temporaries=temporaries,
        flops=parts.flops_per_example * config.batch_size / parts.mesh.size,
        text=text,
        chip=chip,
        program=None if chip is None else read_program(text, chip),
    )
