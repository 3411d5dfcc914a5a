"""The GPUs of a host, divided among its processes; asks the driver's own tool, not JAX."""

from __future__ import annotations

import os
import subprocess

from pgdist.errors import ConfigError


def gpus_of_each_process(chosen: str, *, processes: int) -> list[list[str]]:
    """The GPUs of each process, [] where none are to be divided.

    chosen: "", "all", or their numbers, as in "0,1".  Raises ConfigError where they do not divide evenly.
    """
    if not chosen:
        return []
    gpus = _all_gpus() if chosen == "all" else [gpu.strip() for gpu in chosen.split(",")]
    if not all(gpu.isdecimal() or gpu.startswith(("GPU-", "MIG-")) for gpu in gpus):
        raise ConfigError(f"--gpus={chosen}: expected all, or numbers such as 0,1,2,3")
    if len(set(gpus)) != len(gpus):
        raise ConfigError(f"--gpus={chosen}: a GPU is named twice")
    if not gpus or len(gpus) % processes:
        raise ConfigError(
            f"--gpus={chosen}: {len(gpus)} GPUs cannot be divided evenly among {processes} processes"
        )
    share = len(gpus) // processes
    return [gpus[first : first + share] for first in range(0, len(gpus), share)]


def _all_gpus() -> list[str]:
    """Those that this host, or its scheduler's share of it, has."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--gpus=all: cannot ask nvidia-smi which GPUs there are ({error})") from error
    return listed.stdout.split()
