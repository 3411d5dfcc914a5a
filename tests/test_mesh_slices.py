"""Devices of several slices: `fsdp` within one, `data` over all; for stand-ins, and for TPUs that libtpu describes."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from pgdist.errors import ConfigError
from pgdist.mesh import arrange_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What JAX says of a device, as far as meshes are made of it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpu_nodes(*sizes: int) -> list[Device]:
    """One process a GPU, listed as a scheduler may have numbered them: round the nodes."""
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    places = sorted(
        range(len(nodes)), key=lambda number: (number - nodes.index(nodes[number]), nodes[number])
    )
    return [
        Device(id=number, slice_index=nodes[place], process_index=number)
        for number, place in enumerate(places)
    ]


def tpu_slices(count: int, *, side: int, kind: str = "TPU v5 lite") -> list[Device]:
    """Square slices of one generation."""
    return [
        Device(
            id=100_000 * index + x + side * y,
            slice_index=index,
            platform="tpu",
            device_kind=kind,
            coords=(x, y, 0),
        )
        for index in range(count)
        for y in range(side)
        for x in range(side)
    ]


def slices_of(mesh: np.ndarray) -> list[list[int]]:
    """Of each row of the mesh, which shares parameters: the slices that it has devices of."""
    return [sorted({device.slice_index for device in row}) for row in mesh]


@pytest.mark.parametrize(
    ("devices", "sizes", "shape"),
    [
        pytest.param(gpu_nodes(8, 8), (-1, -1), (2, 8), id="two nodes"),
        pytest.param(gpu_nodes(8, 8, 8), (-1, 4), (6, 4), id="three nodes in halves"),
        pytest.param(gpu_nodes(4, 8), (-1, -1), (3, 4), id="nodes of different sizes"),
        pytest.param(tpu_slices(2, side=4), (-1, -1), (2, 16), id="two slices"),
        pytest.param(tpu_slices(2, side=4), (8, -1), (8, 4), id="two slices, in quarters"),
        pytest.param(tpu_slices(2, side=16), (-1, -1), (4, 128), id="two slices larger than fsdp may be"),
    ],
)
def test_fsdp_stays_within_a_slice_and_data_goes_over_all(devices, sizes, shape):
    mesh = arrange_devices(devices, data=sizes[0], fsdp=sizes[1])

    assert mesh.shape == shape
    assert sorted(device.id for device in mesh.flat) == sorted(device.id for device in devices)
    rows = slices_of(mesh)
    assert all(len(slices) == 1 for slices in rows)
    assert rows == sorted(rows)  # slice after slice along `data`


def test_a_ring_of_a_slice_goes_from_neighbour_to_neighbour():
    for row in arrange_devices(tpu_slices(2, side=4), data=2, fsdp=16):
        places = np.array([device.coords for device in row])
        assert np.all(np.abs(places - np.roll(places, 1, axis=0)).sum(axis=1) == 1)


def test_fsdp_that_would_cross_tpu_slices_is_an_error_that_says_what_to_write():
    with pytest.raises(
        ConfigError,
        match="fsdp=32 crosses the 2 slices of 16 devices: .*--config.mesh.fsdp=16 --config.mesh.data=-1",
    ):
        arrange_devices(tpu_slices(2, side=4), data=1, fsdp=-1)


def test_fsdp_may_cross_nodes_of_gpus_with_a_warning(caplog):
    mesh = arrange_devices(gpu_nodes(4, 4), data=1, fsdp=-1)

    assert mesh.shape == (1, 8)
    assert "fsdp=8 crosses the 2 slices of 4 devices" in caplog.text
    assert "--config.mesh.fsdp=4" in caplog.text


def test_gpus_alone_in_their_nodes_share_parameters_over_the_network(caplog):
    assert arrange_devices(gpu_nodes(1, 1, 1, 1), data=-1, fsdp=-1).shape == (1, 4)
    assert not caplog.text


DESCRIBED = """
from pgdist.mesh import make_mesh
from pgdist.plan import describe_devices
mesh = make_mesh(data={data}, fsdp={fsdp}, devices=describe_devices("{topology}", slices={slices}))
print(dict(mesh.shape), [len({{getattr(device, "slice_index", 0) for device in row}}) for row in mesh.devices])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pgdist[plan]"
)
@pytest.mark.parametrize(
    ("topology", "slices", "data", "fsdp", "shape"),
    [
        ("v5e:4x4", 2, -1, -1, (2, 16)),
        ("v5e:4x4", 2, -1, 4, (8, 4)),
        ("v6e:16x16", 1, 64, 4, (64, 4)),  # an axis of the torus in four
        ("v5p:4x4x4", 2, -1, -1, (2, 64)),
    ],
)
def test_described_tpu_slices_are_kept_together(topology, slices, data, fsdp, shape):
    # In a process of its own: libtpu allows no other platform once it is loaded.
    program = DESCRIBED.format(topology=topology, slices=slices, data=data, fsdp=fsdp)
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout.strip() == f"{{'data': {shape[0]}, 'fsdp': {shape[1]}}} {[1] * shape[0]}"
