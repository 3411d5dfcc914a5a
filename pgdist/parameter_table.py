"""The table of parameters: what each is, how it trains and where it lies; printed at the start and kept.

Nothing is replicated silently: the table ends with what stays whole on every device, and what is large among it is
warned of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding

from pgdist.mesh import LARGEST_FSDP

_WHOLE = "whole"
_MIB = 2**20
# Bytes of an array of all layers together: norms and biases have less at every published size, even in float32.
_LARGE = _MIB


def describe_parameters(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    scales: Mapping[str, float],
    decayed: set[str],
    frozen_dtypes: Mapping[str, str],
    shardings: Mapping[str, NamedSharding],
) -> list[dict[str, Any]]:
    """One JSON-able row a parameter.

    scales: learning-rate scale of each, 0 for frozen ones.  decayed: the names that weight decay touches.
    frozen_dtypes: of each parameter, where it is frozen.  shardings: of each parameter; bytes_per_device is by them.
    """
    rows = []
    for name, leaf in shapes.items():
        dtype = "float32" if scales[name] else frozen_dtypes[name]
        itemsize = jnp.dtype(dtype).itemsize
        rows.append(
            {
                "name": name,
                "shape": list(leaf.shape),
                "dtype": dtype,
                "trainable": bool(scales[name]),
                "lr_scale": scales[name],
                "decay": name in decayed,
                "sharding": _describe_sharding(shardings[name].spec),
                "bytes": math.prod(leaf.shape) * itemsize,
                "bytes_per_device": math.prod(shardings[name].shard_shape(leaf.shape)) * itemsize,
            }
        )
    return rows


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `describe_parameters` in columns, how many parameters train, and how much stays whole."""
    rows = [("name", "shape", "dtype", "trainable", "sharding", "bytes a device")]
    for row in table:
        trains = "frozen"
        if row["trainable"]:
            trains = f"lr x {row['lr_scale']:g}" + (", decays" if row["decay"] else "")
        cells = (row["name"], json.dumps(row["shape"]), row["dtype"], trains, row["sharding"])
        rows.append((*cells, f"{row['bytes_per_device']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    trained = sum(math.prod(row["shape"]) for row in table if row["trainable"])
    total = sum(math.prod(row["shape"]) for row in table)
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters train.", _describe_whole(table)])


def warn_of_replication(table: Sequence[Mapping[str, Any]], *, fsdp: int) -> None:
    """Names the large arrays that stay whole although `fsdp` devices could share them."""
    large = [row for row in table if row["sharding"] == _WHOLE and row["bytes"] >= _LARGE]
    if large and fsdp > 1:
        names = ", ".join(f"{row['name']} ({row['bytes'] / _MIB:,.0f} MiB)" for row in large)
        logging.warning(
            "config.mesh.fsdp=%d does not divide all arrays evenly. Whole on every device: %s. "
            "Powers of two up to %d divide those of every published size; config.mesh.data may have the rest.",
            fsdp,
            names,
            LARGEST_FSDP,
        )


def _describe_whole(table: Sequence[Mapping[str, Any]]) -> str:
    whole = [row for row in table if row["sharding"] == _WHOLE]
    if not whole:
        return "No array stays whole."
    largest = max(whole, key=lambda row: row["bytes"])
    return (
        f"Whole on every device: {len(whole)} of {len(table)} arrays, "
        f"{sum(row['bytes'] for row in whole):,} of its {sum(row['bytes_per_device'] for row in table):,} bytes; "
        f"the largest is {largest['name']} with {largest['bytes']:,}."
    )


def _describe_sharding(spec: Sequence[str | None]) -> str:
    return f"fsdp on axis {list(spec).index('fsdp')}" if "fsdp" in spec else _WHOLE
