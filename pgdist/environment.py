"""What a run depends on besides its config: versions, devices, machine and settings, as one JSON-able dict.

Training writes it beside its results, and a bug report begins with it. A part that cannot be found out says
why instead of failing: this runs exactly where something is broken. Nothing that may be a secret is in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pgdist
from pgdist import backend_flags
from pgdist.limits import describe_limits

PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain tensorstore numpy scipy ml_dtypes ml_collections absl-py "
    "sentencepiece pillow jinja2 rich tensorboardX safetensors libtpu torch transformers"
).split()

# jax-cuda12-plugin and the like, and NVIDIA's libraries that come as packages (cuDNN, NCCL, ...).
_ACCELERATOR_PACKAGES = re.compile(r"jax[-_].*(plugin|pjrt)|nvidia-.*", re.IGNORECASE)

_VARIABLES = re.compile(
    r"(PGDIST|JAX|XLA|LIBTPU|TPU|MEGASCALE|NCCL|SLURM|OMPI|CUDA|NVIDIA|ROCR|HIP|OMP|TF_CPP|GRPC|TENSORSTORE)_\w+"
    r"|JOB_COMPLETION_INDEX|KUBERNETES_SERVICE_HOST|STORAGE_EMULATOR_HOST|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHON\w*"
)
_PROXIES = re.compile(r"(http|https|all|grpc|no|no_grpc)_proxy", re.IGNORECASE)  # can make joining a job hang
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY|AUTH|JWT|COOKIE", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"//[^/@\s]+@")


def describe_environment() -> dict[str, Any]:
    """The environment of this process, ready for `json.dumps`; asks JAX for its devices, which starts it."""
    variables = interesting_variables(os.environ)  # before JAX adds its own
    return {
        "pgdist": pgdist.__version__,
        "git": _describe_checkout(Path(pgdist.__file__).parents[1]),
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}",
        "os": _describe_os(),
        "host": platform.node(),
        "cpu": _describe_cpu(),
        "memory": _describe_memory(),
        "limits": describe_limits(),
        "devices": _describe_devices(),
        "drivers": _describe_drivers(),
        "packages": package_versions(),
        "backend_flags": backend_flags.describe(),
        "variables": variables,
    }


def interesting_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what JAX, XLA, NCCL or a scheduler do; what may be secret is hidden."""
    shown = {}
    for name, value in sorted(environ.items()):
        if _PROXIES.fullmatch(name):
            shown[name] = "(set)"
        elif _VARIABLES.fullmatch(name):
            shown[name] = "(hidden)" if _SECRET.search(name) else _PASSWORD_IN_URL.sub("//(hidden)@", value)
    return shown


def package_versions() -> dict[str, str]:
    """{package: version} of what is installed of those that decide how a run goes."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and _ACCELERATOR_PACKAGES.fullmatch(name):
            versions[name] = distribution.version
    return versions


def _describe_checkout(root: Path) -> dict[str, Any] | None:
    """Revision of the checkout that the package runs from; None for an installed package."""
    if not (root / ".git").exists():  # git itself would find a repository around an installed package
        return None
    revision = _output_of("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output_of("git", "-C", str(root), "status", "--porcelain")
    return {"revision": revision, "modified": None if changes is None else bool(changes)}


def _describe_os() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    return f"{platform.platform()} {distribution}".strip()


def _describe_cpu() -> dict[str, Any]:
    model = re.search(r"^model name\s*:\s*(.+)$", _text_of("/proc/cpuinfo"), re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model[1] if model else platform.processor(), "count": os.cpu_count(), "usable": usable}


def _describe_memory() -> dict[str, int | None]:
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", _text_of("/proc/meminfo"), re.MULTILINE)
    return {
        "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available_bytes": int(available[1]) * 1024 if available else None,
    }


def _describe_devices() -> dict[str, Any]:
    try:
        import jax  # not at the top: a broken JAX is a thing to report

        devices = jax.devices()
        kinds = sorted({device.device_kind for device in devices})
        memory = jax.local_devices()[0].memory_stats() or {}  # None on CPU
        return {
            "backend": jax.default_backend(),
            "platform_version": " ".join(devices[0].client.platform_version.split()),
            "kinds": kinds,
            "count": len(devices),
            "local_count": jax.local_device_count(),
            "memory_bytes_each": memory.get("bytes_limit"),
            "process_count": jax.process_count(),
            "process_index": jax.process_index(),
        }
    except Exception as error:  # no driver, a TPU that another process holds, mismatched packages, ...
        return {"error": f"{type(error).__name__}: {error}"}


def _describe_drivers() -> dict[str, str]:
    """Of accelerators, as the kernel knows them; what JAX says of its own stands with the devices."""
    first_line = _text_of("/proc/driver/nvidia/version").partition("\n")[0]
    found = {"nvidia": first_line.removeprefix("NVRM version:").strip()}
    tpus = [path for pattern in ("accel*", "vfio/[0-9]*") for path in sorted(Path("/dev").glob(pattern))]
    found["tpu"] = ", ".join(map(str, tpus))
    return {name: value for name, value in found.items() if value}


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
