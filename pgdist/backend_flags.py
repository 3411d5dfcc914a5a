"""What XLA, libtpu and NCCL are told before JAX starts, by the kind of device, each setting with its reason.

Nothing of JAX is imported: the backend reads its variables once, as it starts. A setting that the user has made is
kept as it is. A flag that the installed compiler does not know is left out: an unknown one aborts the process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import mmap
import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

SetBy = Literal["pgdist", "user", "nobody"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A variable, or a flag in one that holds many, and why it has this value.

    flag: with its dashes; "" where the variable itself is set.  source: who recommends it, or how it was measured.
    rivals: variables that say the same in another way; JAX refuses some of them together.
    """

    variable: str
    flag: str = ""
    value: str
    reason: str
    source: str
    rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.flag or self.variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What became of a setting.  value: None where nobody set it.  reason: of pgdist's setting, or of leaving it."""

    variable: str
    name: str
    value: str | None
    set_by: SetBy
    reason: str


_GPU = (
    Setting(
        variable="XLA_FLAGS",
        flag="--xla_gpu_enable_latency_hiding_scheduler",
        value="true",
        reason="gathers of the next weights run beside the layer before; off by default in jaxlib 0.10",
        source="docs.jax.dev/en/latest/gpu_performance_tips.html; set in NVIDIA's own JAX images",
    ),
    Setting(
        variable="XLA_CLIENT_MEM_FRACTION",
        value="0.9",
        reason="JAX takes 0.75 of a GPU's memory; tuning all of a 3B model needs up to 70 of 80 GB",
        source="docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance: typically 0.9 or 0.8",
        rivals=(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "XLA_PYTHON_CLIENT_PREALLOCATE",
            "XLA_PYTHON_CLIENT_ALLOCATOR",
        ),
    ),
)
_CPU = (
    Setting(
        variable="XLA_FLAGS",
        flag="--xla_cpu_collective_call_terminate_timeout_seconds",
        value="600",
        reason="simulated devices are threads of one process: a slow one, not a lost one, ends the run after 40 s",
        source="xla/debug_options_flags.cc; lost processes are the launcher's to find",
    ),
    Setting(
        variable="XLA_FLAGS",
        flag="--xla_cpu_enable_concurrency_optimized_scheduler",
        value="false",
        reason="with it jaxlib 0.10.2 corrupts memory of several simulated devices: now and then a loss is NaN",
        source="measured (docs/flags.md): 3 % of the steps that train everything, none without it",
    ),
)
_TPU_V6E = (
    Setting(
        variable="LIBTPU_INIT_ARGS",
        flag="--xla_tpu_scoped_vmem_limit_kib",
        value="65536",
        reason="64 MiB of on-chip memory for one operation, where XLA gives 16: larger tiles",
        source="measured, 10 % fewer cycles (docs/flags.md); MaxText gives v6e 98304, which is worse here",
    ),
)

# By kind of device. Other kinds, such as the other generations of TPUs, run with the compiler's defaults.
TABLE: Mapping[str, tuple[Setting, ...]] = {"gpu": _GPU, "cpu": _CPU, "tpu v6e": _TPU_V6E}

_TPU_CHIPS = {  # by PCI device, as in JAX's hardware_utils
    "0x005e": "tpu v4",
    "0x0062": "tpu v5p",
    "0x0063": "tpu v5e",
    "0x006f": "tpu v6e",
    "0x0076": "tpu7x",
}
_GOOGLE = "0x1ae0"
_HOLD_MANY_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

_kind: str | None = None
_effects: tuple[Effect, ...] = ()


def find_kind(environ: Mapping[str, str] = os.environ, *, root: Path = Path("/")) -> str:
    """The kind of device that JAX will find here: "cpu", "gpu", or a TPU such as "tpu v5e".

    root: of the file system; another one for tests.
    """
    wanted = environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted == "cpu":
        return "cpu"
    if wanted in ("", "tpu") and (tpu := _find_tpu(root)):
        return tpu
    if wanted in ("cuda", "gpu"):
        return "gpu"
    sees_gpus = environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    devices = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # the last one in Windows' Linux
    return "gpu" if sees_gpus and any((root / device).exists() for device in devices) else "cpu"


def apply(kind: str, environ: MutableMapping[str, str] = os.environ) -> tuple[Effect, ...]:
    """Puts the settings of that kind of device into `environ`, but for the user's own; says what became of each.

    Takes effect only before JAX's backend starts. `describe` tells of the last call.
    """
    global _kind, _effects
    effects = _users_flags(environ)
    given = {effect.name for effect in effects}
    for setting in TABLE.get(kind, ()):
        if setting.name in given:
            continue
        rival = next((name for name in (setting.variable, *setting.rivals) if name in environ), None)
        if not setting.flag and rival:
            effects.append(_effect_of_variable(rival, environ[rival]))
        elif setting.flag and (obstacle := _obstacle(setting, environ)):
            effects.append(_effect(setting, value=None, set_by="nobody", reason=obstacle))
        else:
            text = f"{setting.flag}={setting.value}" if setting.flag else setting.value
            before = environ.get(setting.variable, "") if setting.flag else ""
            environ[setting.variable] = f"{before} {text}".strip()
            effects.append(_effect(setting, value=setting.value, set_by="pgdist", reason=setting.reason))
    _kind, _effects = kind, tuple(effects)
    return _effects


def describe() -> dict[str, Any]:
    """What `apply` has done in this process, for env.json; the user's flags alone where it was not called."""
    effects = _effects if _kind is not None else _users_flags(os.environ)
    return {
        "kind": _kind,
        **{
            effect.name: {"value": effect.value, "set_by": effect.set_by, "reason": effect.reason}
            for effect in effects
        },
    }


def _find_tpu(root: Path) -> str | None:
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == _GOOGLE:
                if kind := _TPU_CHIPS.get(vendor.with_name("device").read_text().strip()):
                    return kind
        except OSError:  # a device that has just gone
            continue
    return None


def _users_flags(environ: Mapping[str, str]) -> list[Effect]:
    """Each flag in the variables that hold many; of a flag that stands there twice the compiler takes the last."""
    found = {}
    for variable in _HOLD_MANY_FLAGS:
        for word in environ.get(variable, "").split():
            name, _, value = word.partition("=")
            found[name] = Effect(
                variable=variable,
                name=name,
                value=value or "true",
                set_by="user",
                reason=f"was in {variable}",
            )
    return list(found.values())


def _effect_of_variable(name: str, value: str) -> Effect:
    return Effect(variable=name, name=name, value=value, set_by="user", reason="was in the environment")


def _effect(setting: Setting, *, value: str | None, set_by: SetBy, reason: str) -> Effect:
    return Effect(variable=setting.variable, name=setting.name, value=value, set_by=set_by, reason=reason)


def _obstacle(setting: Setting, environ: Mapping[str, str]) -> str:
    """Why the flag cannot be added; "" where it can."""
    before = environ.get(setting.variable, "").strip()
    if before and not before.startswith("-"):
        return f"{setting.variable} names a file of flags, which is the user's"
    libraries = list(_libraries(setting.variable, environ))
    if not libraries:
        return "the library that reads it was not found"
    unaware = [path.name for path in libraries if not _contains(path, setting.flag.lstrip("-"))]
    return f"not known to {' and '.join(unaware)}" if unaware else ""


def _libraries(variable: str, environ: Mapping[str, str]) -> Iterable[Path]:
    """The installed libraries that read the variable's flags, and abort at one that they do not know."""
    if variable == "LIBTPU_INIT_ARGS":
        own = environ.get("TPU_LIBRARY_PATH")
        return [Path(own)] if own else [folder / "libtpu.so" for folder in _folders("libtpu")]
    found = [folder / "libjax_common.so" for folder in _folders("jaxlib")]
    for folder in _folders("jax_plugins"):
        found += sorted(folder.glob("xla_cuda*/xla_cuda_plugin.so"))
    return [path for path in found if path.exists()]


def _folders(package: str) -> list[Path]:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


def _contains(path: Path, text: str) -> bool:
    """Whether the bytes of a file hold the text; a third of a second for the largest where they do not."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text.encode()) >= 0
    except (OSError, ValueError):  # not there, not readable, empty
        return False
