"""The figures of a compiled training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from pgdist.plan.step import CompiledStep
from pgdist.plan.timing import compute_seconds, link_seconds, sent_bytes

NAME = "train_step"
_SHOWN = 8  # collectives over which nothing is scheduled: those that send most


def as_json(step: CompiledStep) -> dict[str, Any]:
    """What is to be added to the figures of any program."""
    figures: dict[str, Any] = {"model_flops": step.flops}
    program, chip = step.program, step.compiled.chip
    if program is None:
        return figures
    compute, links = compute_seconds(program, chip), link_seconds(program, chip)
    figures["compiled"] = {
        "cycles": program.cycles,
        "collectives": {kind: dataclasses.asdict(each) for kind, each in program.collectives.items()},
        "exposed": [dataclasses.asdict(each) for each in program.transfers if each.is_exposed],
        "uncharged_kernels": [kernel.name for kernel in program.kernels if kernel.cycles is None],
        "loops_of_unknown_length": [loop.body for loop in program.loops if loop.trips is None],
        "loops": [dataclasses.asdict(loop) for loop in program.loops],
    }
    figures["estimated"] = {
        "kernels": [dataclasses.asdict(kernel) for kernel in program.kernels],
        "sent_bytes": sent_bytes(program),
        "compute_seconds": compute,
        "link_seconds": links,
        "larger_seconds": max(compute, links),
        "mfu": step.flops / (max(compute, links) * chip.peak),
    }
    return figures


def describe(step: CompiledStep) -> Iterator[str]:
    """What a step takes, a line each."""
    program, chip, flops = step.program, step.compiled.chip, step.flops
    if program is None:
        return
    compute, links = compute_seconds(program, chip), link_seconds(program, chip)
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
        f"estimated  links        {1e3 * links:.1f} ms a step: {sent_bytes(program) / 1e9:.3f} GB sent in rings at "
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
