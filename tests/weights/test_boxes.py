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


@st.composite
def box_of_an_array(draw):
    """A shape, and a box of it that may be empty."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    box = [tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape]
    return tuple(shape), tuple(box)


def places(box, shape):
    """Where the box's elements lie in C order, as numpy counts them."""
    every = np.ravel_multi_index(np.indices(shape), shape) if shape else np.array(0)
    return every[boxes.within(box, boxes.whole(shape))].reshape(-1).tolist()


def stretches(found):
    """The places in groups of those that lie side by side."""
    return [part.tolist() for part in np.split(found, np.flatnonzero(np.diff(found) != 1) + 1)]


@given(case=box_of_an_array(), max_size=st.integers(1, 100))
def test_runs_cover_a_box_once_in_order_and_each_is_contiguous(case, max_size):
    shape, box = case
    found = [places(run, shape) for run in boxes.runs(box, shape, max_size=max_size)]

    assert [place for run in found for place in run] == places(box, shape)
    assert all(run == list(range(run[0], run[0] + len(run))) for run in found)
    assert all(0 < len(run) <= max_size for run in found)


@given(box_of_an_array())
def test_runs_with_room_are_all_that_lies_side_by_side(case):
    shape, box = case
    found = [places(run, shape) for run in boxes.runs(box, shape, max_size=10**6)]
    if boxes.size_of(box):
        assert found == stretches(places(box, shape))


@given(case=box_of_an_array(), min_run=st.integers(1, 200))
def test_a_widened_box_is_around_the_box_and_no_box_around_it_costs_less(case, min_run):
    """Of those that fill the last axes, which alone make runs longer."""
    shape, box = case

    def cost(candidate):
        return sum(max(min_run, len(run)) for run in stretches(places(candidate, shape)) if run)

    wide = boxes.widen(box, shape, min_run=min_run)
    assert boxes.around([box, wide]) == wide == (boxes.intersect(wide, boxes.whole(shape)) or wide)
    filled = [(*box[:axis], *boxes.whole(shape)[axis:]) for axis in range(len(shape) + 1)]
    assert wide in filled
    assert cost(wide) == min(map(cost, filled))


@given(case=box_of_an_array(), min_run=st.integers(1, 200))
def test_a_box_that_is_one_run_or_of_long_runs_is_not_widened(case, min_run):
    shape, box = case
    runs = stretches(places(box, shape))
    if len(runs) == 1 or len(runs[0]) >= min_run:
        assert boxes.widen(box, shape, min_run=min_run) == box


@given(box_of_an_array())
def test_the_offset_of_a_box_is_numpys(case):
    shape, box = case
    if boxes.size_of(box):
        start = tuple(start for start, _ in box)
        assert boxes.offset_of(box, shape) == (np.ravel_multi_index(start, shape) if shape else 0)


@given(two_boxes())
def test_the_box_around_two_is_the_smallest_that_holds_both(case):
    _, a, b = case
    around = boxes.around([a, b])
    for axis, (lo, hi) in enumerate(around):
        assert lo == min(a[axis][0], b[axis][0]) and hi == max(a[axis][1], b[axis][1])
    assert boxes.around([a]) == a
    assert boxes.intersect(around, a) == boxes.intersect(a, a)
