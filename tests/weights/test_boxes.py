import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgdist.weights import boxes

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(shape=SHAPES, max_size=st.integers(1, 50))
def test_split_covers_every_element_once_in_c_order(shape, max_size):
    array = np.arange(math.prod(shape)).reshape(shape)
    pieces = [array[boxes.within(box, boxes.whole(shape))] for box in boxes.split(shape, max_size=max_size)]

    assert all(0 < piece.size <= max_size for piece in pieces)
    assert [int(i) for piece in pieces for i in piece.reshape(-1)] == list(range(array.size))


@st.composite
def two_boxes(draw):
    shape = draw(st.lists(st.integers(1, 6), max_size=3))
    pairs = [tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape * 2]
    return tuple(shape), tuple(pairs[: len(shape)]), tuple(pairs[len(shape) :])


@given(two_boxes())
def test_intersection_is_what_both_boxes_hold(case):
    shape, a, b = case
    whole = boxes.whole(shape)
    in_a, in_b = np.zeros(shape, bool), np.zeros(shape, bool)
    in_a[boxes.within(a, whole)] = True
    in_b[boxes.within(b, whole)] = True

    shared = boxes.intersect(a, b)

    in_shared = np.zeros(shape, bool)
    if shared is not None:
        in_shared[boxes.within(shared, whole)] = True
    np.testing.assert_array_equal(in_shared, in_a & in_b)


def test_slices_become_boxes_with_their_bounds():
    assert boxes.from_slices((slice(None), slice(2, 4)), (3, 8)) == ((0, 3), (2, 4))
    assert boxes.from_slices((), ()) == ()
