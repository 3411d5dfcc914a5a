"""Boxes as they are written in answers."""

from __future__ import annotations

import pytest

from pgdist.data.locations import Box, find_boxes


def test_boxes_come_in_order_with_their_labels():
    text = "<loc0000><loc0000><loc1023><loc1023> red circle ; <loc0341><loc0682><loc0682><loc1023><seg007> x"
    assert find_boxes(text) == [
        Box(y0=0.0, x0=0.0, y1=1.0, x1=1.0, label="red circle"),
        Box(y0=341 / 1023, x0=682 / 1023, y1=682 / 1023, x1=1.0, label="x"),
    ]


def test_a_box_needs_no_label():
    two = "<loc0000><loc0000><loc0001><loc0001>" * 2
    assert [box.label for box in find_boxes(two)] == ["", ""]


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "<loc0000><loc0000><loc0001>", "<loc0005><loc0000><loc0005><loc0001> no height"],
)
def test_what_is_no_box_is_passed_over(text):
    assert find_boxes(text) == []
