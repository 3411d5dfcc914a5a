"""Devices that are described and not present: slices of TPUs, for which the compiler needs no TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from pgdist.errors import ConfigError

# libtpu asks the machine's metadata server which TPU it has, and takes a lock that one process may hold.
_WITHOUT_A_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_EXPECTED = (
    "expected a kind of TPU and its chips along each axis, such as v5e:4x4, v6e:16x16, v5p:4x4x4 or v4:2x2x4"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator, as its maker gives the figures.

    clock: Hz, of the cycles that the compiler counts.  peak: FLOP/s in bfloat16.  memory: bytes that a program may
    use.  bandwidth: bytes/s of memory.  link: bytes/s that a device sends and receives over all its links in a ring.
    """

    name: str
    clock: float
    peak: float
    memory: int
    bandwidth: float
    link: float


_GIB = 2**30
# By JAX's device_kind. Cloud TPU's system architecture pages; memory is what the compiler leaves to a program.
_CHIPS = {
    "TPU v5 lite": Chip(
        name="v5e", clock=1.5e9, peak=197e12, memory=int(15.75 * _GIB), bandwidth=819e9, link=180e9
    ),
    "TPU v6 lite": Chip(
        name="v6e", clock=1.75e9, peak=918e12, memory=int(31.25 * _GIB), bandwidth=1640e9, link=360e9
    ),
    "TPU v5": Chip(
        name="v5p", clock=1.75e9, peak=459e12, memory=int(95.74 * _GIB), bandwidth=2765e9, link=540e9
    ),
}


def describe_devices(topology: str, *, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of a topology such as "v5e:4x4", in so many slices; programs can be compiled for them, not run.

    Raises ConfigError where there is no such topology, and where libtpu, which has the compiler, is missing.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+){0,2}", topology):
        raise ConfigError(f"--topology={topology}: {_EXPECTED}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology}: the compiler for TPUs is not installed, which needs no TPU: pip install "
            "'pgdist[plan]'."
        )
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:  # of the plugin: no common type
        found = " ".join(str(error).split())[:300]
        raise ConfigError(f"--topology={topology}: {_EXPECTED}; the compiler says: {found}") from error


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device's kind, None for one that pgdist has none of."""
    return _CHIPS.get(device.device_kind)
