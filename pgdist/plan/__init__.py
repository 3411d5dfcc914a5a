"""Looking before running: what a step costs on chips that are described and need not be here."""

from pgdist.plan.program import Collective, Kernel, Loop, Program, read_program
from pgdist.plan.step import CompiledStep, compile_train_step
from pgdist.plan.summary import as_json, describe, open_dump, write_dump
from pgdist.plan.topologies import describe_devices

__all__ = [
    "Collective",
    "CompiledStep",
    "Kernel",
    "Loop",
    "Program",
    "as_json",
    "compile_train_step",
    "describe",
    "describe_devices",
    "open_dump",
    "read_program",
    "write_dump",
]
