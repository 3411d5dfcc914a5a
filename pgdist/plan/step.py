"""Compiling the very step that a run would make, for devices that are here or only described, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pgdist.parts import Parts
from pgdist.plan.program import Program, read_program
from pgdist.plan.topologies import Chip, chip_of
from pgdist.train.compilation import compile_program

_DUMP, _SUMMARY = "train_step.txt", "train_step.json"
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """A step as compiled.  memory: bytes at most, of one device.  arguments: bytes of state, weights and batch among
    them.  program: None for devices whose compiler gives no estimates.
    """

    devices: str
    mesh: dict[str, int]
    seconds: float
    memory: int
    arguments: int
    program: Program | None
    chip: Chip | None

    def as_json(self) -> dict[str, Any]:
        """For files; every figure says by its place whether the compiler gave it or it is estimated from that."""
        compiled: dict[str, Any] = {
            "memory_bytes": self.memory,
            "argument_bytes": self.arguments,
            "compile_seconds": round(self.seconds, 1),
        }
        found: dict[str, Any] = {"devices": self.devices, "mesh": self.mesh, "compiled": compiled}
        if self.program is not None and self.chip is not None:
            program, chip = self.program, self.chip
            compiled |= {
                "cycles": program.cycles,
                "collectives": {kind: dataclasses.asdict(c) for kind, c in program.collectives.items()},
                "kernels": [dataclasses.asdict(kernel) for kernel in program.kernels],
                "loops": [dataclasses.asdict(loop) for loop in program.loops],
            }
            sent = sum(collective.nbytes for collective in program.collectives.values())
            found["estimated"] = {
                "compute_seconds": program.cycles / chip.clock,
                "link_seconds": sent / chip.link,
                "fits": self.memory <= chip.memory,
            }
        return found


def compile_train_step(
    config: ConfigDict, *, devices: Sequence[jax.Device] | None = None, dump: Path | None = None
) -> CompiledStep:
    """Compiles the train step of a config; reads no data and no weights.

    devices: present or described (`describe_devices`); all present ones by default.  dump: a folder that gets the
    program's text and this summary as JSON.

    Raises ConfigError where the step does not fit the devices' memory, with what the compiler says of it.
    """
    parts = Parts(config, devices=devices)
    inputs = parts.step_inputs()
    started = time.perf_counter()
    compiled = compile_program(parts.train_step.lower(inputs.state, inputs.frozen, inputs.batch)).program
    memory = compiled.memory_analysis()
    device = parts.mesh.devices.flat[0]
    chip = chip_of(device)
    text = compiled.as_text()
    step = CompiledStep(
        devices=f"{parts.mesh.size} x {device.device_kind}",
        mesh=dict(parts.mesh.shape),
        seconds=time.perf_counter() - started,
        memory=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        program=None if chip is None else read_program(text, chip),
        chip=chip,
    )
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / _DUMP).write_text(text)
        (dump / _SUMMARY).write_text(json.dumps(step.as_json(), indent=2) + "\n")
    return step


def describe(step: CompiledStep) -> str:
    """The figures for people; each is marked as the compiler's or as estimated from the compiler's."""
    mesh = " x ".join(f"{name}={size}" for name, size in step.mesh.items())
    lines = [
        f"{step.devices}, mesh {mesh}",
        f"compiled   memory       {step.memory / _GIB:.2f} GiB at most, {step.arguments / _GIB:.2f} of it arguments",
        f"compiled   in           {step.seconds:.1f} s",
    ]
    if step.program is None or step.chip is None:
        return "\n".join(lines)
    program, chip = step.program, step.chip
    sent = sum(collective.nbytes for collective in program.collectives.values())
    lines.append(f"compiled   cycles       {program.cycles / 1e6:,.1f} M, collectives not among them")
    lines += [
        f"compiled   {kind:<12} {found.count:,} with {found.nbytes / 1e9:.3f} GB of results"
        for kind, found in program.collectives.items()
    ]
    for kernel in program.kernels:
        charged = (
            "not charged" if kernel.cycles is None else f"charged {kernel.cycles / 1e6:.2f} M cycles each"
        )
        lines.append(f"estimated  kernel       {kernel.name}: {kernel.count}, {charged}")
    unknown = [loop.body for loop in program.loops if loop.trips is None]
    lines += [f"compiled   loop         of unknown length: {body}; one pass is counted" for body in unknown]
    lines += [
        f"estimated  compute      {1e3 * program.cycles / chip.clock:.1f} ms a step",
        f"estimated  links        {1e3 * sent / chip.link:.1f} ms a step, if nothing overlaps",
    ]
    if step.memory > chip.memory:
        lines.append(f"compiled   DOES NOT FIT {chip.name} has {chip.memory / _GIB:.2f} GiB")
    return "\n".join(lines)
