"""Boxes: axis-aligned pieces of an array, ((start, stop), ...) with one pair an axis.

A stored array arrives as a sequence of boxes (so that no more than one block of it is in memory), and each
device wants a box of it (its shard). Everything between the two is the intersection of boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """The box that is the whole array."""
    return tuple((0, size) for size in shape)


def from_slices(slices: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that `slices` (of step 1, as shardings give them) cut out of an array of `shape`."""
    return tuple(piece.indices(size)[:2] for piece, size in zip(slices, shape, strict=True))


def shape_of(box: Box) -> tuple[int, ...]:
    """Shape of the array that a box cuts out."""
    return tuple(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None if that is nothing."""
    shared = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that find `box` in an array which holds `outer`."""
    return tuple(slice(lo - base, hi - base) for (lo, hi), (base, _) in zip(box, outer, strict=True))


def split(shape: Sequence[int], *, max_size: int) -> Iterator[Box]:
    """Boxes of at most `max_size` elements that cover an array, each contiguous in C order, in that order."""
    if math.prod(shape) == 0:
        return
    if not shape:
        yield ()
        return
    axis = next(i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= max_size)
    rows = max(1, max_size // math.prod(shape[axis + 1 :]))
    rest = whole(shape[axis + 1 :])
    for lead in itertools.product(*(range(size) for size in shape[:axis])):
        for start in range(0, shape[axis], rows):
            yield (*((i, i + 1) for i in lead), (start, min(start + rows, shape[axis])), *rest)
