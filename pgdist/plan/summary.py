"""What came of compiling a step: as JSON, for people, and in a folder.

Every figure says whether the compiler gave it or it is estimated from what the compiler gave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgdist.chips import Chip
from pgdist.errors import ConfigError
from pgdist.plan.program import Program
from pgdist.plan.step import CompiledStep

_TEXT, _SUMMARY = "train_step.txt", "train_step.json"
_GIB = 2**30
_SHOWN = 8  # collectives over which nothing is scheduled: those that send most


def as_json(step: CompiledStep) -> dict[str, Any]:
    """{"devices", "mesh", "batch_size", "compiled": {...}} and, for chips that have estimates, "estimated": {...}."""
    compiled: dict[str, Any] = {
        "memory_bytes": step.memory,
        "argument_bytes": step.arguments,
        "temporary_bytes": step.temporaries,
        "compile_seconds": round(step.seconds, 1),
    }
    found: dict[str, Any] = {
        "devices": step.devices,
        "mesh": step.mesh,
        "batch_size": step.batch_size,
        "model_flops": step.flops,
        "compiled": compiled,
    }
    if step.program is None or step.chip is None:
        return found
    program, chip = step.program, step.chip
    compiled |= {
        "memory_limit_bytes": chip.memory,
        "cycles": program.cycles,
        "collectives": {kind: dataclasses.asdict(each) for kind, each in program.collectives.items()},
        "exposed": [dataclasses.asdict(each) for each in program.transfers if each.is_exposed],
        "uncharged_kernels": [kernel.name for kernel in program.kernels if kernel.cycles is None],
        "loops_of_unknown_length": [loop.body for loop in program.loops if loop.trips is None],
        "loops": [dataclasses.asdict(loop) for loop in program.loops],
    }
    compute, links = _compute_seconds(program, chip), _link_seconds(program, chip)
    found["estimated"] = {
        "kernels": [dataclasses.asdict(kernel) for kernel in program.kernels],
        "sent_bytes": _sent(program),
        "compute_seconds": compute,
        "link_seconds": links,
        "larger_seconds": max(compute, links),
        "mfu": step.flops / (max(compute, links) * chip.peak),
    }
    return found


def describe(step: CompiledStep) -> str:
    """The figures for people, one a line."""
    mesh = " x ".join(f"{name}={size}" for name, size in step.mesh.items())
    limit = "" if step.chip is None else f" of {step.chip.memory / _GIB:.2f}"
    lines = [
        f"{step.devices}, mesh {mesh}, {step.batch_size // math.prod(step.mesh.values())} examples a device",
        f"compiled   memory       {step.memory / _GIB:.2f}{limit} GiB at most: arguments "
        f"{step.arguments / _GIB:.2f}, temporaries {step.temporaries / _GIB:.2f}",
        f"compiled   in           {step.seconds:.1f} s",
    ]
    if step.program is None or step.chip is None:
        return "\n".join(
            [*lines, f"no estimate of time: the compiler gives none for {step.devices.partition(' x ')[2]}"]
        )
    return "\n".join([*lines, *_describe_program(step.program, step.chip, step.flops)])


def _describe_program(program: Program, chip: Chip, flops: float) -> Iterator[str]:
    compute, links = _compute_seconds(program, chip), _link_seconds(program, chip)
    yield f"compiled   cycles       {program.cycles / 1e6:,.1f} M, collectives not among them"
    for kind, each in program.collectives.items():
        yield f"compiled   {kind:<12} {each.count:,} with {each.nbytes / 1e9:.3f} GB of results"
    for kernel in program.kernels:
        charged = (
            "NOT CHARGED" if kernel.cycles is None else f"charged {kernel.cycles / 1e6:.2f} M cycles each"
        )
        yield f"estimated  kernel       {kernel.name}: {kernel.count}, {charged}"
    for loop in program.loops:
        if loop.trips is None:
            yield f"compiled   loop         OF UNKNOWN LENGTH: {loop.body}; one pass is counted"
    yield f"estimated  compute      {1e3 * compute:.1f} ms a step, at {chip.clock / 1e9:g} GHz"
    yield (
        f"estimated  links        {1e3 * links:.1f} ms a step: {_sent(program) / 1e9:.3f} GB sent in rings at "
        f"{chip.link / 1e9:g} GB/s"
    )
    yield (
        f"estimated  the larger   {1e3 * max(compute, links):.1f} ms a step, in which {flops / 1e12:.2f} TFLOP of the "
        f"model are {flops / (max(compute, links) * chip.peak):.1%} MFU"
    )
    exposed = [each for each in program.transfers if each.is_exposed]
    sent = sum(each.sent for each in exposed)
    yield (
        f"estimated  exposed      {1e3 * sent / chip.link:.1f} ms of the links' time: no compute is scheduled over"
        f" {len(exposed)} of {len(program.transfers)} collectives"
    )
    for each in exposed[:_SHOWN]:
        where = f"{each.count} x in the loop {each.loop}" if each.loop else "once"
        yield f"           {each.sent / 1e6:8.1f} MB  {each.name}: {each.kind} of {each.result}, {where}"
    if rest := exposed[_SHOWN:]:
        yield f"           {sum(each.sent for each in rest) / 1e6:8.1f} MB  {len(rest)} more"


def open_dump(folder: Path) -> None:
    """Makes the folder for `write_dump`, now: compiling may take minutes.  ConfigError if it cannot be written."""
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_dump(step: CompiledStep, folder: Path) -> None:
    """Writes the program's text to `train_step.txt`, the summary to `train_step.json`."""
    with _writing_to(folder):
        (folder / _TEXT).write_text(step.text)
        (folder / _SUMMARY).write_text(json.dumps(as_json(step), indent=2) + "\n")


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--dump={folder}: cannot write there: {error.strerror}.") from error


def _compute_seconds(program: Program, chip: Chip) -> float:
    return program.cycles / chip.clock


def _link_seconds(program: Program, chip: Chip) -> float:
    return _sent(program) / chip.link


def _sent(program: Program) -> int:
    return sum(transfer.sent for transfer in program.transfers)
