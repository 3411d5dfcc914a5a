"""Devices that are described and not present: slices of TPUs, for which the compiler needs no TPU."""

from __future__ import annotations

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
