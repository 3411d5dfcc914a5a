"""What a device could do at most, by the names that JAX gives devices."""

from __future__ import annotations

import types

import jax
import pytest

from pgdist.chips import chip_of, peak_flops


def device(kind: str, *, cores: int = 1) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, num_cores=cores)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_kinds_have_their_makers_figures(kind, peak):
    assert peak_flops(device(kind)) == peak


def test_a_device_of_two_cores_counts_both():
    assert peak_flops(device("TPU v4", cores=2)) == 275e12
    assert peak_flops(device("TPU v4", cores=1)) == 137.5e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "some chip"])
def test_what_is_not_known_has_no_peak(kind):
    assert peak_flops(device(kind)) is None and chip_of(device(kind)) is None


def test_the_devices_of_the_tests_have_none():
    assert peak_flops(jax.devices()[0]) is None
