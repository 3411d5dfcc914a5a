"""What a device could do at most, by the names that JAX gives devices."""

from __future__ import annotations

import types

import jax
import pytest

from pgdist.chips import chip_of, memory_bandwidth, peak_flops


def device(kind: str, *, cores: int = 1) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, num_cores=cores)


@pytest.mark.parametrize(
    ("kind", "peak", "bandwidth"),
    [
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1600e9),
        ("TPU7x", 1153.5e12, 3690e9),
        ("Tesla T4", 65e12, 320e9),
        ("NVIDIA L4", 121e12, 300e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA GH200 480GB", 989e12, 4000e9),
        ("NVIDIA B200", 2250e12, 8000e9),
    ],
)
def test_kinds_have_their_makers_figures(kind, peak, bandwidth):
    assert peak_flops(device(kind)) == peak
    assert memory_bandwidth(device(kind)) == bandwidth


def test_a_device_of_two_cores_counts_both():
    assert peak_flops(device("TPU v4", cores=2)) == 275e12
    assert peak_flops(device("TPU v4", cores=1)) == 137.5e12
    assert memory_bandwidth(device("TPU v4", cores=2)) == 1200e9


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "some chip"])
def test_what_is_not_known_has_no_figures(kind):
    assert peak_flops(device(kind)) is None and chip_of(device(kind)) is None
    assert memory_bandwidth(device(kind)) is None


def test_the_devices_of_the_tests_have_none():
    assert peak_flops(jax.devices()[0]) is None
