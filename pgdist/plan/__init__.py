"""Looking before running: what a step costs on chips that are described and need not be here."""

from pgdist.chips import Chip, chip_of
from pgdist.plan.program import Collective, Kernel, Loop, Program, Transfer, read_program
from pgdist.plan.step import CompiledStep, compile_train_step
from pgdist.plan.summary import as_json, describe, open_dump, write_dump
from pgdist.plan.topologies import describe_devices

__all__ = [
    "Chip",
    "Collective",
    "CompiledStep",
    "Kernel",
    "Loop",
    "Program",
    "Transfer",
    "as_json",
    "chip_of",
    "compile_train_step",
    "describe",
    "describe_devices",
    "open_dump",
    "read_program",
    "write_dump",
]
