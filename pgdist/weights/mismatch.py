"""The one error for weights that are not the model's: what is missing, what is too much, what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from pgdist.errors import WeightsError
from pgdist.weights.array_info import ArrayInfo, Shaped

_MAX_LINES = 10  # of one kind; a wrong preset makes thirty lines, a wrong file hundreds


Layouts = Callable[[], Mapping[str, Mapping[str, Shaped]]]


def check_fits(
    found: Mapping[str, ArrayInfo],
    *,
    expected: Mapping[str, Shaped],
    path: object,
    layouts: Layouts | None = None,
    hint: str = "",
) -> None:
    """Raises WeightsError unless `found` has exactly the names and shapes of `expected`, and castable dtypes.

    layouts: returns {preset name: {array name: shape}}; called on a mismatch, to name the preset that fits.
    hint: a last sentence on how to go on.
    """
    missing = [
        f"  - {name} {tuple(expected[name].shape)} expected by the model, not in the file"
        for name in expected
        if name not in found
    ]
    unexpected = [
        f"  + {name} {info.shape} in the file, not in the model"
        for name, info in found.items()
        if name not in expected
    ]
    shared = [name for name in expected if name in found]
    differing = [
        line for name in shared if (line := _difference(name, found=found[name], expected=expected[name]))
    ]
    if not (missing or unexpected or differing):
        return
    fitting = len(shared) - len(differing)
    lines = [
        f"{path} does not fit the model: arrays missing (-): {len(missing)}, unexpected (+): "
        f"{len(unexpected)}, of another shape or type (!): {len(differing)}, fitting: {fitting}",
        *_shortened(missing),
        *_shortened(unexpected),
        *_shortened(differing),
        *_advice(found, layouts=layouts),
    ]
    raise WeightsError("\n".join([*lines, hint] if hint else lines))


def _difference(name: str, *, found: ArrayInfo, expected: Shaped) -> str | None:
    if found.shape != tuple(expected.shape):
        return f"  ! {name}: file {found.shape}, model {tuple(expected.shape)}"
    dtype = np.dtype(getattr(expected, "dtype", found.dtype))
    castable = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, found.dtype)) or dtype == found.dtype
    return None if castable else f"  ! {name}: file {found.dtype}, model {dtype}"


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _MAX_LINES + 1:  # "... and 1 more" would save nothing
        return lines
    return [*lines[:_MAX_LINES], f"  {lines[0].strip()[0]} ... and {len(lines) - _MAX_LINES} more"]


def _advice(found: Mapping[str, ArrayInfo], *, layouts: Layouts | None) -> list[str]:
    lines = [description] if (description := _describe(found)) else []
    candidates = layouts() if layouts else {}
    fitting = {name: _share_that_fits(found, layout) for name, layout in candidates.items()}
    best = max(fitting, key=fitting.get, default=None)
    if best is not None and fitting[best] == 1.0:
        names = [name for name, share in fitting.items() if share == 1.0]
        lines.append("It fits " + " or ".join(f"--config.model.preset={name}" for name in names) + ".")
    elif best is not None and fitting[best] >= 0.5:
        lines.append(f"The nearest preset is {best} ({fitting[best]:.0%} of the arrays fit).")
    return lines or ["Choose the preset that the file was written for, or another file."]


def _share_that_fits(found: Mapping[str, ArrayInfo], layout: Mapping[str, Shaped]) -> float:
    names = found.keys() | layout.keys()
    same = sum(
        name in found and name in layout and found[name].shape == tuple(layout[name].shape) for name in names
    )
    return same / max(1, len(names))


def _describe(found: Mapping[str, ArrayInfo]) -> str:
    """What the file looks like in the terms of the presets, from the shapes that tell."""
    facts = []
    embedding = found.get("llm/embedder/input_embedding")
    if embedding is not None and len(embedding.shape) == 2:
        facts.append(f"decoder width {embedding.shape[1]}, vocabulary {embedding.shape[0]:,}")
    query = found.get("llm/layers/attn/q_einsum/w")
    if query is not None and len(query.shape) == 4:
        facts.append(f"{query.shape[0]} layers, {query.shape[1]} heads")
    positions = found.get("img/pos_embedding")
    if positions is not None and len(positions.shape) == 3:
        facts.append(f"{positions.shape[1]} image tokens")
    return f"The file has {', '.join(facts)}." if facts else ""
