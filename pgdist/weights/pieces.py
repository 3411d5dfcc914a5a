"""Pieces: which part of a model's array is stored where, and with its axes in which order.

A published npz stores an array of the model as it is, or as a part of a larger one; transformers stores the layers of
a scanned array apart, most of them transposed. Either way a model's array is made of pieces, each of which is a
block of one stored array whose axes are named in another order: never arithmetic.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.boxes import Box


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of a model's array as a block of a stored array.

    index: where the block is on the leading axes of the model's array; () for all of it.
    view: the shape under which the stored data is seen, a reshape of the stored shape.
    axes: for each axis of the block (the model's, without those of `index`) the axis of the view that it is.
    start: for each axis of the view where the block begins in it.

    The query kernel of image layer 3, (27, W, N, H) in the model and (N * H, W) in transformers, is
    index=(3,), view=(N, H, W), axes=(2, 0, 1), start=(0, 0, 0).
    """

    stored_name: str
    index: tuple[int, ...] = ()
    view: tuple[int, ...]
    axes: tuple[int, ...]
    start: tuple[int, ...]

    def view_box(self, box: Box) -> Box | None:
        """What a box of the model's array is in the view; None if it touches nothing of this piece."""
        if any(not lo <= at < hi for at, (lo, hi) in zip(self.index, box, strict=False)):
            return None
        found = [(at, at + 1) for at in self.start]
        for (lo, hi), axis in zip(box[len(self.index) :], self.axes, strict=True):
            found[axis] = (lo + self.start[axis], hi + self.start[axis])
        return tuple(found)

    def to_model(self, view_box: Box, numbers: np.ndarray) -> tuple[Box, np.ndarray]:
        """A box of the view (within the block) as the model's: its box there, and the numbers with its axes.

        An axis of the view that is none of the block must have one entry in it, that of the block.
        """
        lead = tuple((at, at + 1) for at in self.index)
        box = lead + tuple(
            (view_box[axis][0] - self.start[axis], view_box[axis][1] - self.start[axis]) for axis in self.axes
        )
        fixed = tuple(axis for axis in range(len(self.view)) if axis not in self.axes)
        return box, numbers.transpose(*fixed, *self.axes).reshape([hi - lo for lo, hi in box])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArray:
    """An array under the model's name, and the pieces that it is made of, in the order of the file."""

    info: ArrayInfo
    pieces: tuple[Piece, ...]


def whole_piece(info: ArrayInfo) -> Piece:
    """The piece of an array that is stored as it is, under its own name."""
    axes = tuple(range(len(info.shape)))
    return Piece(stored_name=info.name, view=info.shape, axes=axes, start=(0,) * len(axes))
