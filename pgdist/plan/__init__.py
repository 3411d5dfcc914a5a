"""Looking before running: what a program costs on chips that are described and need not be here."""

from pgdist.plan.compiled import Compiled
from pgdist.plan.decoding import CompiledDecoding, compile_decoding
from pgdist.plan.program import Collective, Kernel, Loop, Program, read_apart, read_program
from pgdist.plan.step import CompiledStep, compile_train_step
from pgdist.plan.summary import as_json, describe, open_dump, write_dump
from pgdist.plan.topologies import describe_devices

__all__ = [
    "Collective",
    "Compiled",
    "CompiledDecoding",
    "CompiledStep",
    "Kernel",
    "Loop",
    "Program",
    "as_json",
    "compile_decoding",
    "compile_train_step",
    "describe",
    "describe_devices",
    "open_dump",
    "read_apart",
    "read_program",
    "write_dump",
]
