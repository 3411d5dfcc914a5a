"""What each process reads of an array that is spread over several: what its devices hold, or a part of its own.

Reading what the devices hold is the least where that lies in long runs. Where every process holds the same, or short
runs of each row (a 2 KiB half of 4 KiB rows costs a disk or a bucket as much as the rows), each process reads a
contiguous part instead, split evenly along another axis, and the devices exchange what they have over their own
network, which is faster than storage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pgdist.weights import boxes
from pgdist.weights.boxes import Box
from pgdist.weights.pieces import ModelArray, Piece
from pgdist.weights.stored import StoredArray

_SMALL = 4 * 2**20  # bytes; an exchange costs a compilation
_MUCH_LESS = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A contiguous box of a piece's view, to be read at once, and what of it is the piece's."""

    piece: Piece
    box: Box
    inside: Box


def sharding_to_read_on(
    array: ModelArray, stored: Mapping[str, StoredArray], sharding: Sharding | None
) -> Sharding | None:
    """The sharding on which the array is read: its own, or one that makes the processes read less.

    The same answer in every process.
    """
    if not isinstance(sharding, NamedSharding) or not is_spread(sharding):
        return sharding
    if math.prod(array.info.shape) * array.info.dtype.itemsize < _SMALL:
        return sharding
    mesh = sharding.mesh
    even = [
        NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names), memory_kind=sharding.memory_kind)
        for axis, size in enumerate(array.info.shape)
        if size % mesh.size == 0
    ]
    costs = [_most_bytes(array, stored, candidate) for candidate in even]
    if costs and min(costs) < _MUCH_LESS * _most_bytes(array, stored, sharding):
        return even[costs.index(min(costs))]
    return sharding


def reads(
    array: ModelArray, stored: Mapping[str, StoredArray], needed: list[Box], *, max_bytes: int
) -> Iterator[Read]:
    """What to read for the needed boxes of the array, in the order of the file, each at most so many bytes."""
    for piece in array.pieces:
        box = _box_to_read(piece, stored[piece.stored_name], needed)
        if box is None:
            continue
        extent = piece.view_box(boxes.whole(array.info.shape))
        itemsize = stored[piece.stored_name].info.dtype.itemsize
        for run in boxes.runs(box, piece.view, max_size=max(1, max_bytes // itemsize)):
            if (inside := boxes.intersect(run, extent)) is not None:
                yield Read(piece=piece, box=run, inside=inside)


def is_spread(sharding: Sharding) -> bool:
    """Whether its devices belong to several processes."""
    return not sharding.is_fully_addressable


def _box_to_read(piece: Piece, stored: StoredArray, needed: list[Box]) -> Box | None:
    """The box of the view around what the needed boxes have of the piece, in runs that are worth a read."""
    found = [box for wanted in needed if (box := piece.view_box(wanted)) is not None]
    if not found:
        return None
    return boxes.widen(boxes.around(found), piece.view, min_run=stored.min_run)


def _most_bytes(array: ModelArray, stored: Mapping[str, StoredArray], sharding: NamedSharding) -> int:
    """The bytes that the process reads which reads the most."""
    needed: dict[int, set[Box]] = {}
    for device, slices in sharding.devices_indices_map(array.info.shape).items():
        box = boxes.from_slices(slices, array.info.shape)
        needed.setdefault(device.process_index, set()).add(box)
    return max(_bytes_to_read(array, stored, list(wanted)) for wanted in set(map(frozenset, needed.values())))


def _bytes_to_read(array: ModelArray, stored: Mapping[str, StoredArray], needed: list[Box]) -> int:
    total = 0
    for piece in array.pieces:
        box = _box_to_read(piece, stored[piece.stored_name], needed)
        if box is not None:
            total += boxes.size_of(box) * stored[piece.stored_name].info.dtype.itemsize
    return total


def exchange(array: jax.Array, sharding: Sharding) -> jax.Array:
    """The array on another sharding over the same devices; all processes call this."""
    return jax.block_until_ready(jax.device_put(array, sharding))
