import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgdist.weights import boxes
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.pieces import Piece, whole_piece


@st.composite
def stored_and_model(draw):
    """A piece, the stored numbers under its view, and the model's array with the block in place, made by numpy."""
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    used = draw(st.permutations(range(len(view)))).copy()
    axes = tuple(used[: draw(st.integers(0, len(used)))])
    start = tuple(draw(st.integers(0, size - 1)) for size in view)
    sizes = {axis: draw(st.integers(1, view[axis] - start[axis])) for axis in axes}
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    index = tuple(draw(st.integers(0, size - 1)) for size in lead)
    piece = Piece(stored_name="w", index=index, view=view, axes=axes, start=start)

    stored = np.arange(1, 1 + math.prod(view)).reshape(view)
    cut = tuple(
        slice(at, at + sizes[axis]) if axis in sizes else at
        for axis, at in zip(range(len(view)), start, strict=True)
    )
    kept = sorted(axes)
    block = stored[cut].transpose([kept.index(axis) for axis in axes])
    model = np.zeros((*lead, *block.shape), int)
    model[index] = block
    return piece, stored, model


def box_in(draw, shape):
    ends = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    return tuple(map(tuple, ends))


def cut(array, box):
    return array[boxes.within(box, boxes.whole(array.shape))]


@given(case=stored_and_model(), data=st.data())
def test_the_box_of_the_view_holds_what_the_model_wants_with_its_axes_in_the_models_order(case, data):
    piece, stored, model = case
    box = box_in(data.draw, model.shape)
    outside = any(not lo <= at < hi for at, (lo, hi) in zip(piece.index, box, strict=False))

    view_box = piece.view_box(box)

    assert (view_box is None) == outside
    if view_box is not None:
        found, numbers = piece.to_model(view_box, cut(stored, view_box))
        lead = tuple((at, at + 1) for at in piece.index)
        assert found == lead + box[len(lead) :]
        np.testing.assert_array_equal(numbers, cut(model, found))
        assert piece.view_box(found) == view_box


@given(case=stored_and_model(), max_size=st.integers(1, 20))
def test_the_runs_of_a_whole_piece_fill_its_block_of_the_model_and_no_more(case, max_size):
    piece, stored, model = case
    result = np.zeros_like(model)
    for run in boxes.runs(piece.view_box(boxes.whole(model.shape)), piece.view, max_size=max_size):
        found, numbers = piece.to_model(run, cut(stored, run))
        assert not cut(result, found).any()
        result[boxes.within(found, boxes.whole(model.shape))] = numbers
    np.testing.assert_array_equal(result, model)


def test_the_documented_example_is_the_query_kernel_of_layer_3():
    layers, width, heads, head_dim = 5, 6, 2, 3
    kernel = np.random.default_rng(0).normal(size=(layers, width, heads, head_dim))
    stored = kernel[3].reshape(width, heads * head_dim).T  # a linear layer of transformers: out x in
    view = (heads, head_dim, width)
    piece = Piece(stored_name="q", index=(3,), view=view, axes=(2, 0, 1), start=(0, 0, 0))

    box, numbers = piece.to_model(boxes.whole(view), stored.reshape(view))

    assert box == ((3, 4), (0, width), (0, heads), (0, head_dim))
    np.testing.assert_array_equal(numbers[0], kernel[3])


def test_an_array_that_is_stored_as_it_is_has_one_piece():
    piece = whole_piece(ArrayInfo(name="x", shape=(2, 3), dtype=np.dtype(np.float32)))
    box, numbers = ((1, 2), (0, 3)), np.array([[4, 5, 6]])
    assert piece.stored_name == "x"
    assert piece.view_box(box) == box
    assert piece.to_model(box, numbers)[0] == box
