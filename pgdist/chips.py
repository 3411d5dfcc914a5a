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
    "TPU v6 lite": Chip(clock=1.75e9, peak=918e12, memory=int(31.25 * _GIB), bandwidth=1640e9, link=360e9),
    "TPU v5": Chip(clock=1.75e9, peak=459e12, memory=int(95.74 * _GIB), bandwidth=2765e9, link=540e9),
}
# Those pages again, of chips for which no step is estimated: FLOP/s of a core, two of which make a chip. JAX shows
# them as one device (v4) or as two.
_CORE_PEAKS = {"TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 137.5e12, "TPU7x": 1153.5e12}
# NVIDIA's data sheets: dense products in bfloat16 with float32 sums, not the "with sparsity" of their headlines; in
# float16 for those before Ampere, which have no bfloat16. Whole names: a part of a card (MIG) has no figure here.
_GPU_PEAKS = (
    (r"Tesla V100-SXM2-(16|32)GB", 125e12),
    (r"Tesla T4", 65e12),
    (r"NVIDIA A100.*-(40|80)GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", 835e12),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 \w+", 989e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA GB200", 2500e12),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The figures of a device's kind, None for one that pgdist has none of."""
    return _CHIPS.get(device.device_kind)


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of a device at most, in products of 16-bit matrices; None for a CPU and for a kind that is not known."""
    kind = device.device_kind
    if kind in _CHIPS:
        return _CHIPS[kind].peak
    if kind in _CORE_PEAKS:
        return _CORE_PEAKS[kind] * device.num_cores
    return next((peak for name, peak in _GPU_PEAKS if re.fullmatch(name, kind)), None)
