"""Kinds of accelerators, with the figures of their makers: what utilisation and estimates are measured against."""

from __future__ import annotations

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator, as its maker gives the figures.

    clock: Hz, of the cycles that the compiler counts.  peak: FLOP/s in bfloat16.  memory: bytes that a program may
    use, and bandwidth: bytes/s at which it reads them.  link: bytes/s that a device sends and receives over all its
    links in a ring.
    """

    clock: float
    peak: float
    memory: int
    bandwidth: float
    link: float


_GIB = 2**30
# By JAX's device_kind. Cloud TPU's system architecture pages; memory is what the compiler leaves to a program.
_CHIPS = {
    "TPU v5 lite": Chip(clock=1.5e9, peak=197e12, memory=int(15.75 * _GIB), bandwidth=819e9, link=180e9),
    "TPU v6 lite": Chip(clock=1.75e9, peak=918e12, memory=int(31.25 * _GIB), bandwidth=1600e9, link=360e9),
    "TPU v5": Chip(clock=1.75e9, peak=459e12, memory=int(95.74 * _GIB), bandwidth=2765e9, link=540e9),
}
# Those pages again, of chips for which no step is estimated: FLOP/s and bytes/s of a core, two of which make a chip.
# JAX shows them as one device (v4) or as two.
_CORES = {
    "TPU v2": (22.5e12, 350e9),
    "TPU v3": (61.5e12, 450e9),
    "TPU v4": (137.5e12, 600e9),
    "TPU7x": (1153.5e12, 3690e9),
}
# NVIDIA's data sheets. FLOP/s: dense products in bfloat16 with float32 sums, not the "with sparsity" of their
# headlines; in float16 for those before Ampere, which have no bfloat16. Bytes/s: of the memory. Whole names: a part of
# a card (MIG) has no figure here.
_GPUS = (
    (r"Tesla V100-SXM2-(16|32)GB", 125e12, 900e9),
    (r"Tesla T4", 65e12, 320e9),
    (r"NVIDIA A100.*-40GB", 312e12, 1555e9),
    (r"NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
    (r"NVIDIA A100.*-80GB|NVIDIA A100 80GB PCIe", 312e12, 1935e9),
    (r"NVIDIA L4", 121e12, 300e9),
    (r"NVIDIA L40S", 362e12, 864e9),
    (r"NVIDIA H100 PCIe", 756e12, 2000e9),
    (r"NVIDIA H100 NVL", 835e12, 3900e9),
    (r"NVIDIA H200 NVL", 835e12, 4800e9),
    (r"NVIDIA H100 80GB HBM3", 989e12, 3350e9),
    (r"NVIDIA H200", 989e12, 4800e9),
    (r"NVIDIA GH200 \w+", 989e12, 4000e9),
    (r"NVIDIA B200", 2250e12, 8000e9),
    (r"NVIDIA GB200", 2500e12, 8000e9),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device's kind, None for one that pgdist has none of."""
    return _CHIPS.get(device.device_kind)


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of a device at most, in products of 16-bit matrices; None for a CPU and for a kind that is not known."""
    return _limits(device)[0]


def memory_bandwidth(device: jax.Device) -> float | None:
    """Bytes/s that a device reads of its memory at most; None as for `peak_flops`."""
    return _limits(device)[1]


def _limits(device: jax.Device) -> tuple[float, float] | tuple[None, None]:
    kind = device.device_kind
    if kind in _CHIPS:
        return _CHIPS[kind].peak, _CHIPS[kind].bandwidth
    if kind in _CORES:
        peak, bandwidth = _CORES[kind]
        return peak * device.num_cores, bandwidth * device.num_cores
    found = (limits for pattern, *limits in _GPUS if re.fullmatch(pattern, kind))
    return next((tuple(limits) for limits in found), (None, None))
