"""The table of parameters: what each is, how it trains and where it lies; printed at the start and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


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
    frozen_dtypes: of each parameter, where it is frozen.
    """
    rows = []
    for name, leaf in shapes.items():
        dtype = "float32" if scales[name] else frozen_dtypes[name]
        rows.append(
            {
                "name": name,
                "shape": list(leaf.shape),
                "dtype": dtype,
                "trainable": bool(scales[name]),
                "lr_scale": scales[name],
                "decay": name in decayed,
                "sharding": _describe_sharding(shardings[name].spec),
                "bytes": math.prod(leaf.shape) * jnp.dtype(dtype).itemsize,
            }
        )
    return rows


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `describe_parameters` in columns, and how many parameters train."""
    rows = [("name", "shape", "dtype", "trainable", "sharding")]
    for row in table:
        trains = "frozen"
        if row["trainable"]:
            trains = f"lr x {row['lr_scale']:g}" + (", decays" if row["decay"] else "")
        rows.append((row["name"], json.dumps(row["shape"]), row["dtype"], trains, row["sharding"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    trained = sum(math.prod(row["shape"]) for row in table if row["trainable"])
    total = sum(math.prod(row["shape"]) for row in table)
    return "\n".join([*lines, f"{trained:,} of {total:,} parameters train."])


def _describe_sharding(spec: Sequence[str | None]) -> str:
    return f"fsdp on axis {list(spec).index('fsdp')}" if "fsdp" in spec else "whole"
