"""Writing a model as a published npz, one array at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from pgdist.weights import fetch, layout
from pgdist.weights.npz_writer import NpzWriter


def save(
    path: str | os.PathLike[str],
    arrays: Mapping[str, fetch.Array],
    *,
    dtype: np.dtype | None = None,
    fuse_qkv: bool = False,
) -> None:
    """Writes arrays (flat names) as an npz in the published layout; the file appears whole or not at all.

    dtype: cast floating arrays to it; None keeps each array's own. bfloat16 is stored as a 2-byte void.
    fuse_qkv: write one `qkv_einsum/w` where query and key heads are equal in number, as published files do.

    Arrays are fetched from their devices one at a time. Where they are spread over several processes all of
    these must call, with the same arrays, and process 0 alone writes (and alone raises what goes wrong with
    the file). An existing file stays as it was until the new one is complete.

    Raises WeightsError if the file cannot be written or a number is too large for `dtype`.
    """
    groups = _stored_groups(arrays, fuse_qkv=fuse_qkv)
    spread = fetch.is_spread(arrays.values())
    copies = fetch.host_copies(groups)
    if spread and jax.process_index() != 0:
        _take_part(copies)
        return
    try:
        with NpzWriter(path, dtype=dtype) as writer:
            for name, members in copies:
                writer.write(name, *members)
                del members  # or it would stand beside the next one
    finally:
        if spread:  # after an error here the other processes are still gathering, and would wait for this one
            _take_part(copies)


def _stored_groups(arrays: Mapping[str, fetch.Array], *, fuse_qkv: bool) -> dict[str, list[fetch.Array]]:
    """What each array of the file is made of: one array, or a query and a key-value array to be fused."""
    groups = {name: [array] for name, array in arrays.items()}
    for fused, (query, key_value) in (layout.fusible(arrays) if fuse_qkv else {}).items():
        groups[fused] = groups.pop(query) + groups.pop(key_value)
    return groups


def _take_part(copies: Iterator[object]) -> None:
    for _ in copies:
        pass
