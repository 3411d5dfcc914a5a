"""Looking before running: what a step costs on chips that are described and need not be here."""

from pgdist.chips import Chip, chip_of
from pgdist.plan.program import Collective, Kernel, Loop, Program, read_program
from pgdist.plan.step import CompiledStep, compile_train_step, describe
from pgdist.plan.topologies import describe_devices

__all__ = [
    "Chip",
    "Collective",
    "CompiledStep",
    "Kernel",
    "Loop",
    "Program",
    "chip_of",
    "compile_train_step",
    "describe",
    "describe_devices",
    "read_program",
]
