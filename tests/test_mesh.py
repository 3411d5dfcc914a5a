"""The mesh: its sizes, the parameters of every preset split on it, the rows of a batch where they belong."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from pgdist.errors import ConfigError
from pgdist.mesh import AXES, batch_sharding, host_rows, make_mesh, parameter_sharding, put_batch
from pgdist.models.presets import PRESETS, preset_layouts

MIB = 2**20
SHAPES = ((8, 1), (2, 4), (1, 8))
PUBLISHED = sorted(set(PRESETS) - {"tiny"})


@functools.cache
def layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """{preset: {parameter: shape}}"""
    return {
        preset: {name: leaf.shape for name, leaf in layout.items()}
        for preset, layout in preset_layouts().items()
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 8)),
        ({"data": -1, "fsdp": -1}, (1, 8)),
        ({"data": 2}, (2, 4)),
        ({"data": 8}, (8, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4)),
        ({"data": 4, "fsdp": 2}, (4, 2)),
    ],
)
def test_minus_one_takes_all_devices_that_are_left(sizes, expected):
    mesh = make_mesh(**sizes)

    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == AXES
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_can_use_some_of_the_devices():
    mesh = make_mesh(devices=jax.devices()[2:3])

    assert list(mesh.devices.flat) == jax.devices()[2:3]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 3}, r"data=3 x fsdp=-1 does not fit 8 device\(s\): their product must be 8"),
        ({"data": 16}, "data=16 x fsdp=-1 does not fit 8"),
        ({"data": -1, "fsdp": 16}, "data=-1 x fsdp=16 does not fit 8"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 does not fit 8"),
        ({"data": 4, "fsdp": 4}, "data=4 x fsdp=4 does not fit 8"),
        ({"data": 0}, "config.mesh.data: expected a positive number or -1"),
        ({"fsdp": -2}, "config.mesh.fsdp: expected a positive number or -1"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error_that_says_so(sizes, expected):
    with pytest.raises(ConfigError, match=expected):
        make_mesh(**sizes)


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 1)), (3, (3, 1)), (4, (1, 4)), (6, (3, 2))])
def test_sizes_left_open_split_every_array_on_any_number_of_devices(count, expected):
    assert tuple(make_mesh(devices=jax.devices()[:count]).shape.values()) == expected


@pytest.mark.parametrize("fsdp", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_what_stays_whole_of_a_published_model_is_small(preset, fsdp):
    mesh = AbstractMesh((1, fsdp), AXES)
    bytes_of = {name: 4 * math.prod(shape) for name, shape in layouts()[preset].items()}  # float32 masters
    specs = {name: parameter_sharding(mesh, name, shape).spec for name, shape in layouts()[preset].items()}
    whole = {name: bytes_of[name] for name, spec in specs.items() if "fsdp" not in spec}
    print(f"{preset} at fsdp={fsdp}: {sum(whole.values()) / MIB:.1f} MiB stay whole on every device")

    assert max(whole.values()) < MIB
    assert sum(whole.values()) < 5 * MIB < sum(bytes_of.values()) / 1000


def documented_axes() -> dict[str, int | None]:
    """{pattern of names: the axis in bold, None for whole} of the table in docs/placement.md."""
    page = (Path(__file__).parents[1] / "docs" / "placement.md").read_text()
    rows = re.findall(r"^\| ((?:`[a-z].*?`(?:, )?)+) \| (\[.*?\]|whole) \|", page, re.MULTILINE)
    found = {}
    for names, axes in rows:
        bold = [axis.startswith("**") for axis in axes.strip("[]").split(", ")]
        found |= dict.fromkeys(re.findall(r"`(.*?)`", names), bold.index(True) if any(bold) else None)
    return found


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_page_on_placement_has_the_axis_of_every_array(preset):
    mesh, documented = AbstractMesh((1, 128), AXES), documented_axes()

    for name, shape in layouts()[preset].items():
        axes = [axis for pattern, axis in documented.items() if fnmatch.fnmatch(name, pattern)]
        spec = list(parameter_sharding(mesh, name, shape).spec)
        assert axes == [spec.index("fsdp") if "fsdp" in spec else None], name


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_split_dimension_divides_and_is_split_once(preset):
    mesh = make_mesh(data=2)

    for name, shape in layouts()[preset].items():
        sharding = parameter_sharding(mesh, name, shape)
        assert [axis for axis in sharding.spec if axis is not None] in ([], ["fsdp"])
        assert math.prod(sharding.shard_shape(shape)) * (4 if "fsdp" in sharding.spec else 1) == math.prod(
            shape
        )


def test_a_dimension_that_does_not_divide_leaves_the_parameter_whole():
    mesh = make_mesh()  # fsdp=8

    assert "fsdp" in parameter_sharding(mesh, "llm/layers/mlp/linear", (2, 6, 16)).spec
    assert "fsdp" not in parameter_sharding(mesh, "llm/layers/mlp/linear", (2, 16, 12)).spec
    assert "fsdp" not in parameter_sharding(mesh, "of/nobody", (16, 16)).spec


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_lands_on_its_device(shape):
    mesh = make_mesh(data=shape[0], fsdp=shape[1])
    sharding, batch_size = batch_sharding(mesh), 16
    rows = host_rows(sharding, batch_size)
    image = np.arange(batch_size * 6, dtype=np.uint8).reshape(batch_size, 2, 3)
    weight = np.arange(batch_size, dtype=np.float32)

    batch = put_batch({"image": image, "weight": weight}, sharding=sharding, batch_size=batch_size)

    assert rows.tolist() == list(range(batch_size))  # this process has all devices
    np.testing.assert_array_equal(batch["image"], image)
    assert batch["image"].dtype == np.uint8 and batch["weight"].dtype == np.float32
    for number, device in enumerate(mesh.devices.flat):  # two rows each, in the order of the mesh
        (shard,) = [shard for shard in batch["weight"].addressable_shards if shard.device == device]
        np.testing.assert_array_equal(shard.data, weight[2 * number : 2 * number + 2])


@pytest.mark.parametrize("batch_size", [1, 7, 12])
def test_a_batch_that_does_not_divide_is_an_error_that_says_by_what(batch_size):
    with pytest.raises(ConfigError, match=f"config.batch_size={batch_size} .*8 devices.*multiple of 8"):
        host_rows(batch_sharding(make_mesh(data=2)), batch_size)
