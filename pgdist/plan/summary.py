"""What came of compiling a program: as JSON, for people, and in a folder.

Every figure says whether the compiler gave it or it is estimated from what the compiler gave.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pgdist.errors import ConfigError
from pgdist.plan import decoding_summary, step_summary
from pgdist.plan.decoding import CompiledDecoding
from pgdist.plan.step import CompiledStep

_GIB = 2**30


def as_json(found: CompiledStep | CompiledDecoding) -> dict[str, Any]:
    """{"devices", "mesh", "batch_size", ..., "compiled": {...}} and, for chips that have estimates, "estimated":
    {...}.
    """
    compiled = found.compiled
    figures = {
        "devices": compiled.devices,
        "mesh": compiled.mesh,
        "batch_size": compiled.batch_size,
        "compiled": {
            "memory_bytes": compiled.memory,
            "argument_bytes": compiled.arguments,
            "temporary_bytes": compiled.temporaries,
            "compile_seconds": round(compiled.seconds, 1),
        },
    }
    if compiled.chip is not None:
        figures["compiled"]["memory_limit_bytes"] = compiled.chip.memory
    for name, more in _summary_of(found).as_json(found).items():
        figures[name] = figures[name] | more if name in figures else more
    return figures


def describe(found: CompiledStep | CompiledDecoding) -> str:
    """The figures for people, one a line."""
    compiled = found.compiled
    mesh = " x ".join(f"{name}={size}" for name, size in compiled.mesh.items())
    limit = "" if compiled.chip is None else f" of {compiled.chip.memory / _GIB:.2f}"
    rows = compiled.batch_size // math.prod(compiled.mesh.values())
    lines = [
        f"{compiled.devices}, mesh {mesh}, {rows} examples a device",
        f"compiled   memory       {compiled.memory / _GIB:.2f}{limit} GiB at most: arguments "
        f"{compiled.arguments / _GIB:.2f}, temporaries {compiled.temporaries / _GIB:.2f}",
        f"compiled   in           {compiled.seconds:.1f} s",
    ]
    if compiled.chip is None:
        kind = compiled.devices.partition(" x ")[2]
        lines.append(f"no estimate of time: the compiler gives none for {kind}")
    return "\n".join([*lines, *_summary_of(found).describe(found)])


def open_dump(folder: Path) -> None:
    """Makes the folder for `write_dump`, now: compiling may take minutes.  ConfigError if it cannot be written."""
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_dump(found: CompiledStep | CompiledDecoding, folder: Path) -> None:
    """Writes the program's text to `train_step.txt` or `generate.txt`, the summary beside it to `.json`."""
    name = _summary_of(found).NAME
    with _writing_to(folder):
        (folder / f"{name}.txt").write_text(found.compiled.text)
        (folder / f"{name}.json").write_text(json.dumps(as_json(found), indent=2) + "\n")


def _summary_of(found: CompiledStep | CompiledDecoding) -> ModuleType:
    return step_summary if isinstance(found, CompiledStep) else decoding_summary


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--dump={folder}: cannot write there: {error.strerror}.") from error
