"""Seconds that are estimated from what the compiler says of a program."""

from __future__ import annotations

from pgdist.chips import Chip
from pgdist.plan.program import Program


def compute_seconds(program: Program, chip: Chip) -> float:
    """Of the cycles that the compiler counts."""
    return program.cycles / chip.clock


def link_seconds(program: Program, chip: Chip) -> float:
    """Of a ring in which each device sends what the collectives send."""
    return sent_bytes(program) / chip.link


def sent_bytes(program: Program) -> int:
    """By each device."""
    return sum(transfer.sent for transfer in program.transfers)
