"""What compiling any program tells, whatever the program does."""

from __future__ import annotations

import dataclasses
import time

import jax
from jax.sharding import Mesh

from pgdist.chips import Chip, chip_of
from pgdist.train.compilation import compile_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program as compiled.

    batch_size: rows of all devices.  seconds: that compiling took.  memory: bytes at most, of one device, of which
    `arguments` are what the program is given, and `temporaries` what it makes and forgets.  text: the program.  chip:
    None for devices whose compiler gives no estimates.
    """

    devices: str
    mesh: dict[str, int]
    batch_size: int
    seconds: float
    memory: int
    arguments: int
    temporaries: int
    text: str
    chip: Chip | None


def compile_lowered(
    lowered: jax.stages.Lowered, *, mesh: Mesh, batch_size: int, saves_memory: str
) -> Compiled:
    """Compiles for the mesh's devices.  saves_memory: for the ConfigError where the program does not fit them."""
    started = time.perf_counter()
    compiled = compile_program(lowered, saves_memory=saves_memory).program
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    device = mesh.devices.flat[0]
    chip = chip_of(device)
    return Compiled(
        devices=f"{mesh.size} x {device.device_kind}",
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        seconds=seconds,
        # Compilers for others than TPUs leave most out of the peak.
        memory=memory.peak_memory_in_bytes if chip else arguments + temporaries,
        arguments=arguments,
        temporaries=temporaries,
        text=text,
        chip=chip,
    )
