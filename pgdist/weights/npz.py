"""The published npz: read and written one array at a time, never the whole file.

`load` streams each array in blocks of a few MiB from the zip, checks and casts the block, and copies what
this process's devices need of it, so that its memory is one array's local shards.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Sharding

from pgdist.weights import fetch, layout, mismatch
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.casting import cast, check_finite
from pgdist.weights.npz_reader import NpzReader
from pgdist.weights.npz_writer import NpzWriter
from pgdist.weights.placement import ShardBuffers

PathLike = str | os.PathLike[str]


def read_header(path: PathLike) -> dict[str, ArrayInfo]:
    """Names (the model's), shapes and dtypes of the arrays in an npz, in the file's order; reads no data.

    Raises WeightsError if the file cannot be read or holds something other than arrays of numbers.
    """
    with NpzReader(path) as reader:
        return {name: part.info for name, part in layout.model_parts(reader.arrays, path=reader.path).items()}


def load(
    path: PathLike,
    *,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Sharding] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    allow_non_finite: bool = False,
    layouts: mismatch.Layouts | None = None,
    hint: str = "",
) -> dict[str, jax.Array]:
    """The arrays of an npz, each cast to its expected dtype and on its sharding, under the model's names.

    expected: {name: shape and dtype}; the file must hold exactly these names and shapes.
    shardings: where each array goes; None, or a name that is absent: the default device.
    dtypes: overrides the dtypes of `expected`.
    layouts, hint: how to go on after a mismatch; see `mismatch.check_fits`.

    Raises WeightsError if the file cannot be read, is damaged, does not fit, or holds a NaN or infinity (or a
    number that becomes one in the wanted dtype), which `allow_non_finite` lets pass. Every process of a job
    reads the whole file, so that all come to the same verdict.
    """
    wanted = {name: np.dtype((dtypes or {}).get(name, leaf.dtype)) for name, leaf in expected.items()}
    arrays: dict[str, jax.Array] = {}
    with NpzReader(path) as reader:
        parts = layout.model_parts(reader.arrays, path=reader.path)
        found = {name: part.info for name, part in parts.items()}
        mismatch.check_fits(found, expected=expected, path=reader.path, layouts=layouts, hint=hint)
        for stored_name, pieces in layout.group_by_stored(parts).items():
            buffers = {
                part.info.name: ShardBuffers(
                    part, dtype=wanted[part.info.name], sharding=(shardings or {}).get(part.info.name)
                )
                for part in pieces
            }
            for box, block in reader.blocks(stored_name):
                for name, buffer in buffers.items():
                    numbers = cast(block, wanted[name])
                    if not allow_non_finite:
                        check_finite(numbers, source=block, name=stored_name, path=reader.path)
                    buffer.write(box, numbers)
            arrays |= {name: buffer.to_devices() for name, buffer in buffers.items()}
            gc.collect(0)  # only when Python collects does JAX let go of the host buffers that it was given
    return {name: arrays[name] for name in expected}


def save(
    path: PathLike,
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


def fingerprint(path: PathLike) -> str:
    """Hex digest of an npz's contents: the names, sizes and CRCs that the zip directory lists.

    No array is read. The order of the arrays in the file and its name do not matter.
    """
    with NpzReader(path) as reader:
        return reader.fingerprint()


def _stored_groups(arrays: Mapping[str, fetch.Array], *, fuse_qkv: bool) -> dict[str, list[fetch.Array]]:
    """What each array of the file is made of: one array, or a query and a key-value array to be fused."""
    groups = {name: [array] for name, array in arrays.items()}
    for fused, (query, key_value) in (layout.fusible(arrays) if fuse_qkv else {}).items():
        groups[fused] = groups.pop(query) + groups.pop(key_value)
    return groups


def _take_part(copies: Iterator[object]) -> None:
    for _ in copies:
        pass
