"""Compiling the training step beside what else a start has to do, and saying whether it came from the cache.

The step is traced where it is asked for and compiled in a thread, from shapes and shardings alone: reading the
weights takes as long, and needs other parts of the machine. What comes of it is the program that a first call would
have made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
from absl import logging

from pgdist import cluster
from pgdist.errors import ConfigError

PyTree = Any
THREAD = "pgdist-compile"  # what its name begins with

# These names of events are documented in no list; JAX's own dashboards count them.
_EVENTS = "/jax/compilation_cache/"
# What the TPU's compiler says of a program that is too large: the two figures stand in one of these.
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ASKED, _HIT, _KEPT = _EVENTS + "compile_requests_use_cache", _EVENTS + "cache_hits", _EVENTS + "cache_misses"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """A compiled program.  seconds: of compiling, or of reading it.  cache: where it came from; "off" without one.
    is_kept: whether this process has written it for the next start.
    """

    program: jax.stages.Compiled
    seconds: float
    cache: Literal["hit", "miss", "off"]
    is_kept: bool


def compile_program(lowered: jax.stages.Lowered, *, saves_memory: str) -> Compilation:
    """Compiles a traced step; ConfigError where it does not fit the devices' memory, with what saves some."""
    started = time.perf_counter()
    with _events_of_this_thread() as events, _explaining_memory(saves_memory):
        program = lowered.compile()
    return Compilation(
        program=program,
        seconds=time.perf_counter() - started,
        cache=_source(events),
        is_kept=_KEPT in events,
    )


class BackgroundStep:
    """A jitted training step that is being compiled; calling it waits for that."""

    def __init__(self, step: Any, *inputs: PyTree, saves_memory: str) -> None:
        """step: jitted.  inputs: jax.ShapeDtypeStruct leaves with shardings, as it will be called.  saves_memory: for
        the error where there is too little.
        """
        self._saves_memory = saves_memory
        lowered = step.lower(*inputs)
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD)
        self._compilation = executor.submit(compile_program, lowered, saves_memory=saves_memory)
        executor.shutdown(wait=False)
        self._is_told = False

    def wait(self) -> Compilation:
        """What came of it, once it is there; process 0 logs it.  Raises ConfigError as `compile_program`."""
        found = self._compilation.result()
        if not self._is_told:
            self._is_told = True
            if cluster.is_primary():
                logging.info("%s", _describe(found))
        return found

    def __call__(self, state: PyTree, frozen: PyTree, batch: PyTree) -> tuple[Any, dict[str, jax.Array]]:
        """One step; ConfigError where the devices' memory is too small for it, which some only find out now."""
        program = self.wait().program
        with _explaining_memory(self._saves_memory):
            return program(state, frozen, batch)


def _source(events: set[str]) -> Literal["hit", "miss", "off"]:
    if _ASKED not in events or not jax.config.jax_compilation_cache_dir:
        return "off"
    return "hit" if _HIT in events else "miss"


def is_compiling() -> bool:
    """Whether a program is still being compiled in this process, which Python would wait for as it ends."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def _describe(found: Compilation) -> str:
    folder = jax.config.jax_compilation_cache_dir
    if found.cache == "hit":
        return f"Read the training step from the cache in {found.seconds:.1f} s ({folder})."
    told = {
        True: f"cache miss; the next start reads it from {folder}",
        False: "cache miss; too quick to be kept",
    }
    note = "no cache" if found.cache == "off" else told[found.is_kept]
    return f"Compiled the training step in {found.seconds:.1f} s ({note})."


@contextlib.contextmanager
def _events_of_this_thread() -> Iterator[set[str]]:
    """The names of JAX's events; others compile meanwhile, in threads of their own."""
    found: set[str] = set()
    thread = threading.get_ident()

    def note(event: str, **_: str | int) -> None:
        if threading.get_ident() == thread:
            found.add(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(note)


@contextlib.contextmanager
def _explaining_memory(saves_memory: str) -> Iterator[None]:
    """Raises ConfigError, with what can be done, where the devices' memory is too small."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Of the memory on a TPU's chip there may be too little for one operation: no field of the config helps.
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error).lower():
            raise
        shortage = _describe_shortage(str(error))
        raise ConfigError(f"The step does not fit: {shortage}. What helps: {saves_memory}.") from error


def _describe_shortage(message: str) -> str:
    figures = next((match for pattern in _TOO_LARGE if (match := pattern.search(message))), None)
    if figures is None:
        return " ".join(message.split())[:300].rstrip(".")
    wanted, there_is = (float(figures[i]) * _UNITS[figures[i + 1]] / _UNITS["G"] for i in (1, 3))
    return f"it wants {wanted:.2f} GiB of each device, which has {there_is:.2f} GiB"
