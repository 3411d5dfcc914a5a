"""Compiling what a command would run, instead of running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import membership
from pgdist.errors import ConfigError

if TYPE_CHECKING:
    import jax

    from pgdist.plan import CompiledDecoding, CompiledStep

_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the program and say what it costs; no data, no weights, nothing run."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --compile_only: TPUs to compile for that need not be here, such as v5e:4x4."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Of the topology, joined by the network.", lower_bound=1)
_DUMP = flags.DEFINE_string(
    "dump", None, "With --compile_only: folder for the program's text and the figures."
)


def is_wanted() -> bool:
    """Whether --compile_only was given; ConfigError where the flags for it were and it was not."""
    if not _COMPILE_ONLY.value and (_TOPOLOGY.value or _DUMP.value or _SLICES.value > 1):
        raise ConfigError("--topology, --slices and --dump are for --compile_only.")
    return _COMPILE_ONLY.value


def run(compile_for: Callable[[Sequence[jax.Device] | None], CompiledStep | CompiledDecoding]) -> None:
    """Prints on standard output what compiling tells, and writes it to --dump.

    compile_for: given the described devices, None for those that are here; may import JAX.
    """
    if _TOPOLOGY.value:
        answers = membership.stay_alone(topology=_TOPOLOGY.value)
    elif _SLICES.value > 1:
        raise ConfigError("--slices is for --topology.")
    else:
        answers = membership.join_job()
    from pgdist import plan

    devices = plan.describe_devices(_TOPOLOGY.value, slices=_SLICES.value) if _TOPOLOGY.value else None
    if _DUMP.value:
        plan.open_dump(Path(_DUMP.value))
    found = compile_for(devices)
    print(plan.describe(found), file=answers, flush=True)
    if _DUMP.value:
        plan.write_dump(found, Path(_DUMP.value))
