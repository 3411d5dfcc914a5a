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


def size_of(box: Box) -> int:
    """How many elements are in it."""
    return math.prod(shape_of(box))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None if that is nothing."""
    shared = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that find `box` in an array which holds `outer`."""
    return tuple(slice(lo - base, hi - base) for (lo, hi), (base, _) in zip(box, outer, strict=True))


def runs(box: Box, shape: Sequence[int], *, max_size: int) -> Iterator[Box]:
    """The box of an array of `shape` as boxes of at most `max_size` elements, each contiguous in C order, in that
    order.
    """
    sizes = shape_of(box)
    if math.prod(sizes) == 0:
        return
    if not sizes:
        yield ()
        return
    first = _contiguous_from(sizes, shape)
    axis = next(i for i in range(first, len(sizes)) if math.prod(sizes[i + 1 :]) <= max_size)
    rows = max(1, max_size // math.prod(sizes[axis + 1 :]))
    lo, hi = box[axis]
    for lead in itertools.product(*(range(*pair) for pair in box[:axis])):
        for start in range(lo, hi, rows):
            yield (*((i, i + 1) for i in lead), (start, min(start + rows, hi)), *box[axis + 1 :])


def split(shape: Sequence[int], *, max_size: int) -> Iterator[Box]:
    """`runs` of a whole array."""
    return runs(whole(shape), shape, max_size=max_size)


def widen(box: Box, shape: Sequence[int], *, min_run: int) -> Box:
    """The box, or one around it that costs less to read: a contiguous run costs its size, but at least `min_run`."""

    def cost(candidate: Box) -> int:
        sizes = shape_of(candidate)
        first = _contiguous_from(sizes, shape)
        return math.prod(sizes[:first]) * max(min_run, math.prod(sizes[first:]))

    if size_of(box) == 0:
        return box
    filled = ((*box[:axis], *whole(shape[axis:])) for axis in reversed(range(len(box))))
    return min((box, *filled), key=cost)


def around(several: Sequence[Box]) -> Box:
    """The smallest box around some."""
    return tuple(
        (min(lo for lo, _ in pairs), max(hi for _, hi in pairs)) for pairs in zip(*several, strict=True)
    )


def offset_of(box: Box, shape: Sequence[int]) -> int:
    """Where in an array of `shape`, counted in elements in C order, the first element of the box is."""
    offset = 0
    for (start, _), size in zip(box, shape, strict=True):
        offset = offset * size + start
    return offset


def _contiguous_from(sizes: Sequence[int], shape: Sequence[int]) -> int:
    """The last axis that a box of `sizes` does not fill, from which on its elements lie side by side; or 0."""
    return max((i for i in range(len(sizes)) if sizes[i] != shape[i]), default=0)
