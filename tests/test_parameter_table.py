"""The table of parameters: what each device holds of each array, and what stays whole."""

from __future__ import annotations

import functools
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from pgdist.mesh import AXES, parameter_shardings
from pgdist.models.presets import PRESETS, preset_layouts
from pgdist.parameter_table import describe_parameters, format_table, warn_of_replication

PUBLISHED = sorted(set(PRESETS) - {"tiny"})
MIB = 2**20


@functools.cache
def layouts() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    return preset_layouts()


def table_of(preset: str, *, fsdp: int, data: int = 1) -> list[dict]:
    """All parameters train."""
    shapes = layouts()[preset]
    return describe_parameters(
        shapes,
        scales=dict.fromkeys(shapes, 1.0),
        decayed=set(),
        frozen_dtypes={},
        shardings=parameter_shardings(AbstractMesh((data, fsdp), AXES), shapes),
    )


def test_a_row_says_what_one_device_holds():
    rows = {row["name"]: row for row in table_of("paligemma-3b-224", data=2, fsdp=128)}

    embedding = rows["llm/embedder/input_embedding"]
    assert (embedding["sharding"], embedding["bytes"]) == ("fsdp on axis 0", 4 * 257_152 * 2048)
    assert embedding["bytes_per_device"] == 4 * 257_152 * 2048 // 128
    norm = rows["llm/layers/pre_ffw_norm/scale"]
    assert (norm["sharding"], norm["bytes"], norm["bytes_per_device"]) == (
        "whole",
        4 * 18 * 2048,
        4 * 18 * 2048,
    )


def test_the_last_lines_add_up_what_trains_and_what_stays_whole():
    table = table_of("paligemma2-28b-896", fsdp=64)
    whole = [math.prod(row["shape"]) * 4 for row in table if row["sharding"] == "whole"]
    held = sum(whole) + sum(math.prod(row["shape"]) * 4 // 64 for row in table if row["sharding"] != "whole")

    header, *_, trains, stays = format_table(table).splitlines()

    assert header.split("  ")[-1] == "bytes a device"
    assert trains.endswith("parameters train.")
    assert stays == (
        f"Whole on every device: {len(whole)} of {len(table)} arrays, {sum(whole):,} of its {held:,} bytes; "
        f"the largest is llm/layers/post_attention_norm/scale with {4 * 46 * 4608:,}."
    )


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_no_published_size_replicates_anything_large_on_2_to_128_devices(preset, fsdp, caplog):
    warn_of_replication(table_of(preset, fsdp=fsdp), fsdp=fsdp)

    assert not caplog.text


@pytest.mark.parametrize("fsdp", [3, 24, 256])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_large_arrays_that_stay_whole_are_named_with_their_size(preset, fsdp, caplog):
    table = table_of(preset, fsdp=fsdp)
    warn_of_replication(table, fsdp=fsdp)

    assert f"config.mesh.fsdp={fsdp} does not divide" in caplog.text
    for row in table:
        named = f"{row['name']} ({row['bytes'] / MIB:,.0f} MiB)"
        assert (named in caplog.text) == (row["bytes_per_device"] >= MIB and row["sharding"] == "whole")
